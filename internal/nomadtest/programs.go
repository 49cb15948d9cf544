package nomadtest

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/bivouac-run/bivouac/internal/testimage"
)

// Programs are the files that an agent is made of.
type Programs struct {
	// Bivouac and Shim are what is tested; Nomad, Runsc and CNIDir (a
	// directory of plugins) are the pinned peers.
	Bivouac, Shim, Nomad, Runsc, CNIDir string
}

// FindPrograms returns what the environment names (the Makefile sets it), or
// an error that says what is missing.
func FindPrograms() (Programs, error) {
	var p Programs
	if os.Getuid() != 0 {
		return p, fmt.Errorf("sandboxes, namespaces and cgroups need root")
	}
	for _, v := range []struct {
		name string
		to   *string
	}{
		{"BIVOUAC_BIN", &p.Bivouac}, {"BIVOUAC_SHIM", &p.Shim}, {"BIVOUAC_NOMAD", &p.Nomad},
		{"BIVOUAC_RUNSC", &p.Runsc}, {"BIVOUAC_CNI_DIR", &p.CNIDir},
	} {
		*v.to = os.Getenv(v.name)
		if *v.to == "" {
			return p, fmt.Errorf("%s is not set: run the tests with make", v.name)
		}
		if _, err := os.Stat(*v.to); err != nil {
			return p, fmt.Errorf("%s: %w: run the tests with make", v.name, err)
		}
	}
	if _, err := testimage.Path(); err != nil {
		return p, err
	}
	return p, nil
}

// Need returns the programs. Without them it skips the test, or fails it where
// a skip would hide something (CI=true or BIVOUAC_CI=1).
func Need(t testing.TB) Programs {
	t.Helper()
	p, err := FindPrograms()
	if err == nil {
		return p
	}
	if os.Getenv("BIVOUAC_CI") == "1" || os.Getenv("CI") == "true" {
		t.Fatal(err)
	}
	t.Skip(err)
	return p
}

// cleanEnv is the environment of an agent: this process's, without what would
// change how Nomad behaves.
func cleanEnv(extra ...string) []string {
	var env []string
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		if strings.HasPrefix(name, "NOMAD_") || strings.HasPrefix(name, "BIVOUAC_") || strings.HasPrefix(name, "AWS_") ||
			strings.HasPrefix(name, "CONSUL_") || strings.HasPrefix(name, "VAULT_") {
			continue
		}
		env = append(env, kv)
	}
	return append(env, extra...)
}
