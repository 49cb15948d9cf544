// Command bivouac-shim is the process that owns one sandbox: see package shim.
//
// It is a program of its own because one runs for every task: linking what the
// driver links would cost each of them tens of milliseconds and megabytes.
//
//	bivouac-shim STATE_DIR    started by the driver only
//	bivouac-shim --probe      the program that the driver's boot check runs in a sandbox
package main

import (
	"fmt"
	"os"

	"github.com/bivouac-run/bivouac/driver/internal/shim"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "bivouac-shim is started by the bivouac driver, with the state directory of one task")
		os.Exit(2)
	}
	if os.Args[1] == "--probe" {
		fmt.Println("bivouac probe")
		return
	}
	os.Exit(shim.Main(os.Args[1], os.NewFile(shim.StatusFD, "status"), os.NewFile(shim.LockFD, "lock")))
}
