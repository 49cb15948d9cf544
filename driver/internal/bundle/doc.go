// Package bundle turns facts about one Nomad task, already decided by the
// driver, into an OCI runtime spec and the small files beside it, for gVisor's
// runsc.
//
// Data flows one way:
//
//	image config + job's task config ── Merge ───────▶ Process
//	Process.User + image's passwd, group ── ResolveUser ▶ User
//	Process, User, mounts, limits (Task) ── Spec ─────▶ specs.Spec (config.json)
//	specs.Spec.Process + command ── ExecProcess ──────▶ specs.Process (process.json)
//	addresses and names ── ResolvConf, Hosts, Hostname ▶ file contents
//
// The package is pure: it opens no file, starts no process, asks no clock and
// keeps no state, so every function may be called concurrently. The same input
// gives the same bytes: environments and mounts are in a fixed order.
//
// It fails closed. Spec reports every problem it finds in one joined error and
// then returns no spec. Host namespaces cannot be expressed, nor can user
// annotations that runsc reads as configuration.
//
// It leaves out, on purpose:
//   - policy: which host paths, capabilities or users a job may ask for is
//     decided by the driver before it gets here;
//   - symbolic links: paths are checked as text. runsc resolves mount
//     destinations inside the sandbox's root; sources and network namespaces
//     are the driver's to resolve;
//   - runsc's own annotations (dev.gvisor.*): the driver adds those to the
//     returned spec, from values that no job can set;
//   - devices, sysctls and tmpfs mounts asked for by a job, and swap.
//
// Image files and image configs are hostile input: passwd and group are read up
// to a bound (an image config's size is its reader's to bound), and what cannot
// be written to JSON unchanged is refused. No error text contains an argument
// or the value of an environment variable, which may be secret.
//
// Known to be wrong: runsc (checked with the build of September 2026) ignores
// the mqueue mount with a warning, so POSIX message queues have no directory
// in the sandbox. The mount stays, because Docker writes it and a later runsc
// may honour it.
package bundle
