// Package runsc runs gVisor's runsc and understands its answers.
//
// It is the only package that knows runsc's options: those for untrusted code
// are fixed here and are the same for every command of a task, as runsc
// demands. It builds the command lines that the shim executes (run, delete),
// and itself executes the short ones (version, kill, exec) and the boot check.
//
// Nothing a user writes becomes an option or an annotation here: annotations
// named dev.gvisor.* could switch the sandbox's protections off. Secrets in a
// process's environment travel in an anonymous file, never in arguments.
//
// It knows nothing of Nomad, images or cgroups.
package runsc
