// Package image is the image store of the gvisor task driver: it turns an image
// reference into a directory that a sandbox can use as its read-only root.
//
// A reference names a registry (go-containerregistry speaks the protocol), an
// OCI layout ("oci:PATH[:tag]") or a docker save archive
// ("docker-archive:PATH[:tag]"). Data flows one way, for every kind:
//
//	Get → reference → source (manifest digest, config, layers) → unpack → rootfs/<digest>
//
// A layer is streamed: its bytes are hashed as they arrive, decompressed, hashed
// again and unpacked into a temporary directory, which is renamed into place only
// after every digest and diffID has matched and the file system was synced. Layers
// are therefore parsed before they are verified; unpack.go treats them as hostile
// in any case, and what it wrote is removed if a digest turns out wrong.
//
// On disk, below the directory given to Open (mode 0700, because images hold
// setuid files that other users of the host must not reach):
//
//	version.json                     {"version":1}; a newer number is refused
//	v1/lock                          flock held for short changes of tmp and refs
//	v1/rootfs/<sha256>/root/         unpacked root, shared by all tasks, never written again
//	v1/rootfs/<sha256>/image.json    config and platform of that image
//	v1/refs/<sha256>.json            what a reference and platform last resolved to
//	v1/tmp/<random>/{lock,image/}    an unpack in progress; lock is flocked by its owner
//
// Several stores may have one directory open at a time, in one process or in two:
// a plugin that is being replaced overlaps its successor.
//
// Left out: garbage collection, registry credentials (pulls are anonymous),
// signatures, resuming a broken download, and access control between tasks: an image
// that one task pulled is there for every task that names it, as with Docker.
// Nothing here mounts anything; making the root read-only is the caller's part.
//
// Known differences from Docker: device nodes in an image are not made (the sentry
// provides /dev), extended attributes other than user.* and security.capability are
// dropped, and an archive's digest is that of a manifest made from its config
// (see archive.go), since docker save stores none.
//
// Linux only (openat2, kernel 5.6 or newer).
package image
