package e2e

import (
	"fmt"
	"testing"

	"github.com/bivouac-run/bivouac/internal/nomadtest"
	"github.com/hashicorp/nomad/api"
)

// Twenty tasks start at once, from an image that is pulled once.
func TestManyTasksAtOnce(t *testing.T) {
	t.Parallel()
	a := agent(t)
	registry := startRegistry(t)
	img := newImage(t, "")
	const n = 20
	j := nomadtest.Batch(t, registry.push(t, "many:1", img), "echo task $NOMAD_ALLOC_INDEX of $NOMAD_ALLOC_ID")
	j.Group.Count = ptr(n)
	seen := map[string]bool{}
	for _, alloc := range a.Run(t, j.Job).DoneAll(t, n) {
		if alloc.ClientStatus != api.AllocClientStatusComplete {
			t.Errorf("allocation is %s: %s", alloc.ClientStatus, nomadtest.Events(alloc, "main"))
			continue
		}
		var index int
		if _, err := fmt.Sscanf(alloc.Name, *j.ID+".sandbox[%d]", &index); err != nil {
			t.Fatalf("name %q: %v", alloc.Name, err)
		}
		want := fmt.Sprintf("task %d of %s\n", index, alloc.ID)
		a.AwaitLog(t, alloc, "stdout", func(s string) bool { return s == want })
		seen[want] = true
	}
	if len(seen) != n {
		t.Errorf("%d different outputs, want %d", len(seen), n)
	}
	// One layer and one config.
	if got := registry.layers.Load(); got != 2 {
		t.Errorf("%d blobs were fetched, want 2: the image was not pulled once", got)
	}
}
