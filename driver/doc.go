// Package driver is the Nomad task driver `gvisor`: it runs each task in a
// gVisor sandbox of its own. (Our driver is one letter from Nomad's package
// drivers, which defines the interface implemented here.)
//
// A start flows through one list of steps, with one way back from all of them:
//
//	config -> image (driver/internal/image) -> bundle (driver/internal/bundle)
//	       -> limits (driver/internal/cgroup) -> network (driver/internal/network)
//	       -> shim (driver/internal/shim) -> runsc
//
// After it the driver holds nothing that the sandbox needs. The shim owns the
// sandbox, its output and the record of its end; a task's state directory
// under /run says all that a new driver process must know. So the plugin may
// be killed at any time: RecoverTask reads the directory again, and a start
// that was cut short is taken over when Nomad repeats it.
//
// A task with a network gets a namespace of its own behind the allocation's
// (driver/internal/network), because runsc empties the one it joins; a task
// without has loopback only.
//
// What the driver leaves out: log rotation (Nomad's log collector reads the
// FIFOs), devices, what a network may reach.
package driver
