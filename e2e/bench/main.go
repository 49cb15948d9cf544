// Command bench measures Bivouac beside its peers, on one machine and in one
// run:
//
//	bench start [-n N] [-o json] [-only ROW]
//
// start measures the life of a task without a network: StartTask, exec,
// stop_destroy, memory_pss_per_sandbox and register_to_running. The driver is
// spoken to as Nomad does it, over gRPC with the plugin process, and, for
// register_to_running, by a real agent. Its peers are runsc itself with the
// same options, runtime spec and image root, and Nomad's raw_exec driver. Ours
// and the peer take turns, so that whatever else the machine does hits both.
//
// The table goes to stdout, progress to stderr, and the figures, unrounded, to
// build/bench-start.json below the working directory. p99 is the nearest rank:
// with fewer than 100 samples it is the worst one.
//
// It needs root, and the programs that BIVOUAC_BIN, BIVOUAC_SHIM,
// BIVOUAC_RUNSC and BIVOUAC_NOMAD name (`make bench-start` sets them). All it
// makes is removed at the end, after an interrupt too. What it leaves out:
// pulling images, networks, and the docker driver as a peer.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	context.AfterFunc(ctx, stop) // a second interrupt ends the program without clean-up
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options are what the command line says.
type options struct {
	// samples is the number of tasks per side; register_to_running takes a
	// quarter of it.
	samples int
	// only is the one row to measure; empty means all.
	only string
	// json prints the figures as JSON instead of a table.
	json bool
}

// wants says whether a row is to be measured.
func (o options) wants(row string) bool { return o.only == "" || o.only == row }

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 || args[0] != "start" {
		return errors.New("usage: bench start [-n N] [-o json] [-only ROW]")
	}
	var opts options
	var format string
	flags := flag.NewFlagSet("bench start", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&opts.samples, "n", 60, "tasks to start on each side; register_to_running takes a quarter")
	flags.StringVar(&format, "o", "table", "output on stdout: table or json")
	flags.StringVar(&opts.only, "only", "", "measure this row only: "+strings.Join(startRows, ", "))
	if err := flags.Parse(args[1:]); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	opts.json = format == "json"
	switch {
	case flags.NArg() > 0:
		return fmt.Errorf("unknown argument %q", flags.Arg(0))
	case format != "json" && format != "table":
		return fmt.Errorf("-o %q: neither table nor json", format)
	case opts.samples < 1:
		return fmt.Errorf("-n %d: at least one", opts.samples)
	case opts.only != "" && !slices.Contains(startRows, opts.only):
		return fmt.Errorf("-only %q: not one of %s", opts.only, strings.Join(startRows, ", "))
	case os.Geteuid() != 0:
		return errors.New("sandboxes and cgroups need root")
	}
	r := &report{progress: stderr}
	if err := benchStart(ctx, opts, r); err != nil {
		return err
	}
	if err := r.writeJSON(filepath.Join("build", "bench-start.json")); err != nil {
		return err
	}
	if opts.json {
		return r.encode(stdout)
	}
	return r.table(stdout)
}
