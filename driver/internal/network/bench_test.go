package network

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// BenchmarkAttach reports medians and 99th percentiles of the first, and only,
// attachment of an allocation, as at a task's start.
//
//	go test -run '^$' -bench Attach -benchtime 100x ./driver/internal/network
func BenchmarkAttach(b *testing.B) {
	w := newWorld(b)
	const pause = 100 * time.Millisecond // the kernel removes namespaces in its own time
	var attach, detach []time.Duration
	for i := range b.N {
		o := w.options(Options{ID: fmt.Sprintf("web.%d", i), Task: "web", Ports: []uint16{8080}})
		began := time.Now()
		a, err := Attach(w.path(), o)
		attach = append(attach, time.Since(began))
		if err != nil {
			b.Fatal(err)
		}
		time.Sleep(pause)
		began = time.Now()
		err = Detach(a)
		detach = append(detach, time.Since(began))
		if err != nil {
			b.Fatal(err)
		}
		time.Sleep(pause)
	}
	report(b, "attach", attach)
	report(b, "detach", detach)
}

func report(b *testing.B, name string, took []time.Duration) {
	slices.Sort(took)
	for _, p := range []int{50, 99} {
		b.ReportMetric(float64(took[(len(took)-1)*p/100].Microseconds())/1000, fmt.Sprintf("ms-%s-p%d", name, p))
	}
}
