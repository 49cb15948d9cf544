package runsc

import (
	"context"
	"testing"
	"time"
	"os"
)

func TestProbeTmp(t *testing.T) {
	r := &Runtime{Path: os.Getenv("BIVOUAC_RUNSC"), Root: t.TempDir(), Platform: "systrap", CoreTags: CoreTagsSupported()}
	t.Log(r.CoreTags)
	v, err := r.Version(t.Context())
	t.Log(v, err)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	t0 := time.Now()
	if err := r.Probe(ctx, os.Getenv("BIVOUAC_SHIM"), t.TempDir()); err != nil { t.Fatal(err) }
	t.Log(time.Since(t0))
	t.Log(r.Kill(ctx, "nosuch", 15))
	t.Log(r.Delete(ctx, "nosuch"))
}
