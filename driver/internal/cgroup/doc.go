// Package cgroup writes a task's limits into the cgroup that Nomad made for
// it, and reads the task's use and its OOM kills from there.
//
// Nomad's client makes the task's cgroup before it starts the task, hands over
// one path, and kills and removes that cgroup when the allocation stops. So
// everything of a task must run there, and the limits must be there before the
// sandbox is: runsc applies none to a cgroup that it finds. With cgroup v2
// that is one directory, with v1 one per controller, of which Nomad makes
// freezer, cpu and memory, and a cpuset in a tree of its own; runsc makes and
// removes the rest.
//
// The package neither creates processes nor moves them.
package cgroup
