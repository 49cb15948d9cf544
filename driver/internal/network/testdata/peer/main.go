// Command peer is the tests' program on both ends of a connection: static, so
// that it runs in a sandbox with nothing else.
//
//	peer sleep
//	peer serve tcp|udp ADDR NAME    answers each line with NAME and the sender
//	peer ask tcp|udp LOCAL REMOTE   prints the answer; LOCAL may be ""
//	peer hold tcp|udp LOCAL REMOTE  the same for each line of standard input
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
)

const patience = 3 * time.Second

func main() {
	var err error
	switch os.Args[1] {
	case "sleep":
		time.Sleep(time.Hour)
	case "serve":
		err = serve(os.Args[2], os.Args[3], os.Args[4])
	case "ask", "hold":
		err = ask(os.Args[1] == "hold", os.Args[2], os.Args[3], os.Args[4])
	default:
		err = errors.New("unknown command")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(network, addr, name string) error {
	if strings.HasPrefix(network, "udp") {
		c, err := net.ListenPacket(network, addr)
		if err != nil {
			return err
		}
		fmt.Println("ready")
		buf := make([]byte, 2048)
		for {
			_, from, err := c.ReadFrom(buf)
			if err != nil {
				return err
			}
			_, _ = c.WriteTo(fmt.Appendf(nil, "%s %s\n", name, from), from)
		}
	}
	l, err := net.Listen(network, addr)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			for lines := bufio.NewScanner(c); lines.Scan(); {
				_, _ = fmt.Fprintf(c, "%s %s\n", name, c.RemoteAddr())
			}
		}()
	}
}

func ask(hold bool, network, local, remote string) error {
	d := net.Dialer{Timeout: patience, Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1) })
	}}
	if local != "" {
		var err error
		if strings.HasPrefix(network, "udp") {
			d.LocalAddr, err = net.ResolveUDPAddr(network, local)
		} else {
			d.LocalAddr, err = net.ResolveTCPAddr(network, local)
		}
		if err != nil {
			return err
		}
	}
	c, err := d.DialContext(context.Background(), network, remote)
	if err != nil {
		return err
	}
	defer c.Close()
	answers := bufio.NewReader(c)
	turn := func() error {
		_ = c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Write([]byte("who\n")); err != nil {
			return err
		}
		answer, err := answers.ReadString('\n')
		fmt.Print(answer)
		return err
	}
	if !hold {
		return turn()
	}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		if err := turn(); err != nil {
			return err
		}
	}
	return nil
}
