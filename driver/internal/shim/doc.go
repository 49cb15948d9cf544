// Package shim is the small process that stands between Nomad's driver plugin
// and one sandbox, so that the plugin may die at any time.
//
// One shim serves one task. It is a session leader of its own outside the
// task's cgroup and a child subreaper, so the sandbox, orphaned by `runsc run
// --detach`, becomes its child and its exit status cannot get lost. It owns
// the task's output: the sandbox writes to pipes, the shim copies them to the
// FIFOs of Nomad's log collector and opens those again when their reader
// comes and goes.
//
// Everything the two processes tell each other is a file in the task's state
// directory, or one line on a pipe at start:
//
//	driver --shim.json-->  shim    what to run (Config)
//	driver <--pipe-------  shim    the start worked or not (Started)
//	driver <--started.json-shim    the same, for a plugin that came later
//	driver <--exit.json--  shim    how the task ended (Exit)
//
// The driver learns of the end by waiting for the shim process itself, which
// needs no connection to restore.
//
// The package knows nothing of Nomad or of runsc's options: it is handed whole
// command lines. It leaves signals, exec and statistics to the driver.
package shim
