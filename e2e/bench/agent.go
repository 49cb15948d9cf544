package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/hashicorp/nomad/api"
	"golang.org/x/sys/unix"
)

// agent is a Nomad agent of our own, server and client in one.
type agent struct {
	api *api.Client
	cmd *exec.Cmd
	// ended is closed when the process has been reaped.
	ended chan struct{}
}

// startAgent starts it and waits until both drivers are healthy.
func startAgent(ctx context.Context, h *host) (*agent, error) {
	ports, err := freePorts(3)
	if err != nil {
		return nil, err
	}
	config := map[string]any{
		"bind_addr":  "127.0.0.1",
		"plugin_dir": filepath.Dir(h.bivouac),
		"ports":      map[string]int{"http": ports[0], "rpc": ports[1], "serf": ports[2]},
		"client": map[string]any{"enabled": true, "options": map[string]string{
			// A cloud's metadata service may be slow to say that it is none.
			"fingerprint.denylist": "env_aws,env_azure,env_digitalocean,env_gce",
		}},
		"plugin": []map[string]any{
			{"gvisor": map[string]any{"args": []string{"driver"}, "config": h.pluginConfig("agent")}},
			{"raw_exec": map[string]any{"config": map[string]any{"enabled": true}}},
		},
	}
	raw, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(h.dir, "agent.json")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		return nil, err
	}
	a, err := launchAgent(ctx, h, path)
	if err != nil {
		return nil, err
	}
	a.api, err = api.NewClient(&api.Config{Address: fmt.Sprintf("http://127.0.0.1:%d", ports[0])})
	if err == nil {
		err = a.waitReady(ctx)
	}
	if err != nil {
		a.stop()
		log, _ := os.ReadFile(filepath.Join(h.dir, "agent.log"))
		return nil, fmt.Errorf("start a Nomad agent: %w\n%s", err, log[max(0, len(log)-4000):])
	}
	return a, nil
}

func launchAgent(ctx context.Context, h *host, config string) (*agent, error) {
	log, err := os.Create(filepath.Join(h.dir, "agent.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	// It outlives an interrupt, so that it can be stopped in order.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), h.nomad, "agent", "-dev", "-config="+config)
	// Nothing of the caller's environment but PATH: proxies, certificates and
	// NOMAD_ variables would make runs differ. -dev puts its data in TMPDIR.
	cmd.Env = []string{"TMPDIR=" + h.dir, "HOME=" + h.dir, "PATH=" + os.Getenv("PATH")}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start a Nomad agent: %w", err)
	}
	a := &agent{cmd: cmd, ended: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // its exit status says nothing that the API did not
		close(a.ended)
	}()
	return a, nil
}

// waitReady waits until the node is ready and both drivers are healthy.
func (a *agent) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // until this function returns
		select {
		case <-a.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	return poll(ctx, 90*time.Second, func(ctx context.Context) error {
		q := (&api.QueryOptions{}).WithContext(ctx)
		nodes, _, err := a.api.Nodes().List(q)
		if err != nil {
			return err
		}
		if len(nodes) == 0 || nodes[0].Status != "ready" {
			return errors.New("the node is not ready")
		}
		for _, name := range []string{"gvisor", "raw_exec"} {
			if d := nodes[0].Drivers[name]; d == nil || !d.Healthy {
				return fmt.Errorf("driver %s is not healthy", name)
			}
		}
		return nil
	})
}

// stop ends the agent, which in -dev mode ends its tasks.
func (a *agent) stop() {
	const patience = 20 * time.Second
	_ = a.cmd.Process.Signal(os.Interrupt)
	select {
	case <-a.ended:
	case <-time.After(patience):
		_ = a.cmd.Process.Kill()
		<-a.ended
	}
}

// freePorts asks the kernel for ports that nobody listens on now.
func freePorts(count int) ([]int, error) {
	var ports []int
	for range count {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		addr, ok := l.Addr().(*net.TCPAddr)
		if !ok {
			return nil, fmt.Errorf("%v is no TCP address", l.Addr())
		}
		ports = append(ports, addr.Port)
	}
	return ports, nil
}
