// Package nomadtest runs a real Nomad agent with the driver in it, for
// end-to-end tests.
//
// An Agent owns everything it touches: a random token names its directory
// below /tmp, its run_dir below /run and its bridge, and every process it
// starts has the token in its command line or its environment. So several
// agents can run on one machine, beside a developer's own, and each finds what
// is its own when it looks for leftovers or cleans up. The agent is not a -dev
// one: its state lies on disk, and it can be killed and started again.
//
// Stop ends all jobs, then the agent, and reports whatever is then left on the
// host. An agent whose test process was killed is cleaned up by the next one
// that starts.
//
// What the package does not isolate: Nomad 1.11 has one cgroup parent per
// host, and /var/run/netns is shared, so in those two places leftovers are
// looked for by allocation ID. Only allocations that a test has seen count.
// For the same reason an agent that restarts while a task of another agent has
// reserved cores fails its own tasks ("unable to update reserve cpuset").
package nomadtest
