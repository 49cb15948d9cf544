package statefile

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

type payload struct{ Name string }

func TestWriteThenReadReturnsPayloadAndBoot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.json")
	if err := Write(path, 2, payload{"a"}); err != nil {
		t.Fatal(err)
	}
	var got payload
	meta, err := Read(path, 2, &got)
	if err != nil {
		t.Fatal(err)
	}
	boot, err := BootID()
	if err != nil {
		t.Fatal(err)
	}
	if got.Name != "a" || meta.Version != 2 || meta.BootID != boot {
		t.Fatalf("got %+v, %+v", got, meta)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, want 0600", info.Mode())
	}
}

func TestReadRefuses(t *testing.T) {
	dir := t.TempDir()
	cases := map[string]struct {
		content string
		want    string
	}{
		"newer":      {`{"version":9,"data":{}}`, "newer release"},
		"no version": {`{"data":{}}`, "no version"},
		"torn":       {`{"version":1,"da`, "decode"},
		"empty":      {``, "decode"},
		"wrong type": {`{"version":1,"data":{"Name":7}}`, "decode"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
				t.Fatal(err)
			}
			var p payload
			_, err := Read(path, 1, &p)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, want %q", err, c.want)
			}
		})
	}
	var p payload
	if _, err := Read(filepath.Join(dir, "absent"), 1, &p); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("absent: %v", err)
	}
}

func TestConcurrentReadersNeverSeeATornFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.json")
	if err := Write(path, 1, payload{"0"}); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				var p payload
				if _, err := Read(path, 1, &p); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 200 {
		if err := Write(path, 1, payload{strings.Repeat("x", 5000)}); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 {
		t.Fatalf("temporary files left: %v", entries)
	}
}

func TestWriteToMissingDirectoryLeavesNothing(t *testing.T) {
	if err := Write(filepath.Join(t.TempDir(), "no", "x"), 1, payload{}); err == nil {
		t.Fatal("no error")
	}
}
