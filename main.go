// Command bivouac is every part of Bivouac in one binary: the first argument
// chooses the role. It has no logic of its own.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/bivouac-run/bivouac/driver"
	"github.com/bivouac-run/bivouac/internal/version"
)

const usage = `Usage: bivouac ROLE [options]

Roles that Nomad starts:
  driver      the task driver "gvisor": runs tasks in gVisor sandboxes

For people:
  version     print the version (-o json for machines)
  help        print this
`

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run chooses the role and returns the exit code: 2 for a mistake on the
// command line.
func run(args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return 2
	}
	switch args[0] {
	case "driver":
		return driver.Serve()
	case "version", "-version", "--version":
		return printVersion(args[1:], stdout, stderr)
	case "help", "-h", "-help", "--help":
		fmt.Fprint(stdout, usage)
		return 0
	default:
		fmt.Fprintf(stderr, "bivouac: unknown role %q\n\n%s", args[0], usage)
		return 2
	}
}

func printVersion(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("bivouac version", flag.ContinueOnError)
	flags.SetOutput(stderr)
	output := flags.String("o", "text", "output `format`: text or json")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	switch *output {
	case "text":
		fmt.Fprintf(stdout, "bivouac %s (%s)\n", version.Version, version.Revision())
	case "json":
		_ = json.NewEncoder(stdout).Encode(map[string]string{"version": version.Version, "revision": version.Revision()})
	default:
		fmt.Fprintf(stderr, "bivouac version: -o %q is neither text nor json\n", *output)
		return 2
	}
	return 0
}
