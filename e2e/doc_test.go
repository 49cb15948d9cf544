// Package e2e tests the driver from outside: real jobs on a real Nomad agent.
//
// Most tests share one agent, which the first of them starts and TestMain
// stops; that stop also looks for what the jobs left on the host. Tests that
// kill things, or count them, have agents of their own.
package e2e

import (
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/bivouac-run/bivouac/internal/nomadtest"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.agent != nil {
		if err := shared.agent.Stop(); err != nil {
			fmt.Fprintf(os.Stderr, "stop the shared agent: %v\n", err)
			code = max(code, 1)
		}
	}
	for _, dir := range shared.dirs {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

// canary is in the agent's environment and must not be in a sandbox's.
const canary = "canary-5f1d"

var shared struct {
	once  sync.Once
	agent *nomadtest.Agent
	dirs  []string
	err   error
}

// agent returns the shared agent. Its log since now is printed if t fails.
func agent(t *testing.T) *nomadtest.Agent {
	t.Helper()
	programs := nomadtest.Need(t)
	shared.once.Do(func() {
		volume, err := os.MkdirTemp("/tmp", "bvv-")
		if err != nil {
			shared.err = err
			return
		}
		shared.dirs = append(shared.dirs, volume)
		shared.err = os.Chmod(volume, 0o777)
		if shared.err != nil {
			return
		}
		shared.agent, shared.err = nomadtest.Launch(programs, nomadtest.Options{
			Env: []string{"SECRET_CANARY=" + canary},
			HostVolumes: map[string]nomadtest.HostVolume{
				"shared":   {Path: volume},
				"readonly": {Path: volume, ReadOnly: true},
			},
		})
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	mark := shared.agent.LogMark()
	t.Cleanup(func() { shared.agent.LogOnFailure(t, mark) })
	return shared.agent
}

// busybox is the image that most tests use.
func busybox(t *testing.T) string { return agent(t).Image(t, "busybox", nil) }

func ptr[T any](v T) *T { return &v }
