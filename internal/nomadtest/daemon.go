package nomadtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// daemon is one Nomad process. A nil one has ended.
type daemon struct {
	cmd *exec.Cmd
	// exited is closed when the process has been reaped.
	exited chan struct{}
}

func startDaemon(nomad, config string, l layout, env []string) (*daemon, error) {
	log, err := os.OpenFile(l.log(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	d := &daemon{cmd: exec.Command(nomad, "agent", "-config", config), exited: make(chan struct{})}
	d.cmd.Dir = l.dir
	d.cmd.Env = env
	d.cmd.Stdout, d.cmd.Stderr = log, log
	// Ctrl-C at the terminal is for the test; it then stops the agent.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { // ends with the process, which kill ends
		_ = d.cmd.Wait()
		close(d.exited)
	}()
	return d, nil
}

func (d *daemon) pid() int {
	if d == nil {
		return 0
	}
	return d.cmd.Process.Pid
}

// gone returns an error once the process has ended.
func (d *daemon) gone() error {
	if d == nil {
		return errors.New("the agent was not started")
	}
	select {
	case <-d.exited:
		return fmt.Errorf("the agent has ended: %v", d.cmd.ProcessState)
	default:
		return nil
	}
}

// kill ends the process with SIGKILL and returns when it is gone.
func (d *daemon) kill() error {
	if d == nil {
		return nil
	}
	if err := d.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill agent: %w", err)
	}
	<-d.exited
	return nil
}

// interrupt stops the process as an operator does.
func (d *daemon) interrupt() error {
	if err := d.cmd.Process.Signal(os.Interrupt); err != nil {
		return fmt.Errorf("stop agent: %w", err)
	}
	const patience = 20 * time.Second
	select {
	case <-d.exited:
		return nil
	case <-time.After(patience):
		return fmt.Errorf("stop agent: still there after %v", patience)
	}
}
