// Command demoimage writes the demonstration image, a static busybox, as an
// OCI layout:
//
//	demoimage DIR
package main

import (
	"fmt"
	"os"

	"github.com/bivouac-run/bivouac/internal/testimage"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: demoimage DIR")
		os.Exit(2)
	}
	img, err := testimage.Busybox(nil)
	if err == nil {
		err = testimage.Layout(os.Args[1], img)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demoimage:", err)
		os.Exit(1)
	}
}
