// Package driver is the Nomad task driver `gvisor`: it runs each task in a
// gVisor sandbox of its own. (Our driver is one letter from Nomad's package
// drivers, which defines the interface implemented here.)
//
// A start flows through one list of steps, each with its undo:
//
//	config -> image (driver/internal/image) -> bundle (driver/internal/bundle)
//	       -> limits (driver/internal/cgroup) -> shim (driver/internal/shim) -> runsc
//
// After it the driver holds nothing that the sandbox needs. The shim owns the
// sandbox, its output and the record of its end; a task's state directory
// under /run says all that a new driver process must know. So the plugin may
// be killed at any time: RecoverTask reads the directory again, and a start
// that was cut short is taken over when Nomad repeats it.
//
// What the driver leaves out: networks (it joins the namespace that Nomad
// hands over, and gives a task without one loopback only), log rotation
// (Nomad's log collector reads the FIFOs), devices.
//
// Known to be wrong: runsc takes the addresses off the interfaces of the
// network namespace it joins, so a task that restarts within its allocation
// finds a namespace without network.
package driver
