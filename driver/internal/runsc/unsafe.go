package runsc

import "unsafe"

// ptr is the address of v for a system call that writes to it.
func ptr(v *uint64) uintptr { return uintptr(unsafe.Pointer(v)) }
