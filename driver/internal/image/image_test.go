package image

import (
	"os"
	"path/filepath"
	"testing"
)

func TestHasLooksInsideTheRootOnly(t *testing.T) {
	root := t.TempDir()
	outside := filepath.Join(t.TempDir(), "secret")
	for path, content := range map[string]string{outside: "x", filepath.Join(root, "file"): "y"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{"link": "/file", "escape": outside, "up": "../../../../../../etc/passwd"} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	img := &Image{Root: root}
	for name, want := range map[string]bool{
		"/file": true, "/link": true, "/": true, "/none": false, "/escape": false, "/up": false, "/file/below": false,
	} {
		got, err := img.Has(name)
		if err != nil || got != want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}
