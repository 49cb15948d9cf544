package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"
	"time"
)

// row is one line of the table and one object of the JSON file.
type row struct {
	Name    string  `json:"name"`
	Unit    string  `json:"unit"`
	OursP50 float64 `json:"ours_p50"`
	OursP99 float64 `json:"ours_p99"`
	// Peer is empty, and what follows null, for a part of another row.
	Peer    string   `json:"peer"`
	PeerP50 *float64 `json:"peer_p50"`
	PeerP99 *float64 `json:"peer_p99"`
	Ratio   *float64 `json:"ratio"`
}

// report collects what was measured.
type report struct {
	progress io.Writer
	rows     []row
	notes    []string
}

// add appends a row. Without peer samples it has no peer.
func (r *report) add(name, unit string, ours samples, peer string, theirs samples) {
	line := row{Name: name, Unit: unit, OursP50: ours.percentile(50), OursP99: ours.percentile(99)}
	if len(theirs) > 0 {
		p50, p99 := theirs.percentile(50), theirs.percentile(99)
		ratio := line.OursP50 / p50
		line.Peer, line.PeerP50, line.PeerP99, line.Ratio = peer, &p50, &p99, &ratio
	}
	r.rows = append(r.rows, line)
}

// note appends a line below the table.
func (r *report) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// sayf reports progress.
func (r *report) sayf(format string, args ...any) {
	fmt.Fprintf(r.progress, format+"\n", args...)
}

func (r *report) encode(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(r.rows)
}

func (r *report) writeJSON(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := r.encode(f); err != nil {
		f.Close()
		return fmt.Errorf("write %q: %w", path, err)
	}
	return f.Close()
}

// table prints the rows aligned, and the notes.
func (r *report) table(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "\tunit\tours p50\tours p99\tpeer p50\tpeer p99\tratio\tpeer\t")
	for _, l := range r.rows {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t", l.Name, l.Unit, figure(&l.OursP50), figure(&l.OursP99))
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t\n", figure(l.PeerP50), figure(l.PeerP99), figure(l.Ratio), orDash(l.Peer))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, n := range r.notes {
		if _, err := fmt.Fprintln(w, "note:", n); err != nil {
			return err
		}
	}
	return nil
}

func figure(v *float64) string {
	if v == nil {
		return "-"
	}
	return fmt.Sprintf("%.2f", *v)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// samples are measurements in the row's unit, in the order they were taken.
type samples []float64

// addTime appends a duration, in milliseconds.
func (s *samples) addTime(d time.Duration) {
	*s = append(*s, float64(d)/float64(time.Millisecond))
}

// percentile returns the nearest rank; 0 of no samples.
func (s samples) percentile(p float64) float64 {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s))
	rank := int(math.Ceil(p / 100 * float64(len(sorted))))
	return sorted[max(rank, 1)-1]
}

// least returns the smallest sample, which other load on the machine distorts
// the least.
func (s samples) least() float64 { return slices.Min(s) }

// pairRatios divides the samples one by one: slow changes of the machine's
// load drop out.
func pairRatios(ours, theirs samples) samples {
	var r samples
	for i := range min(len(ours), len(theirs)) {
		r = append(r, ours[i]/theirs[i])
	}
	return r
}
