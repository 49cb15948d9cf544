// Package statefile writes small JSON state files that survive a crash at any
// instruction.
//
// A file is an envelope: format version, boot id of the host that wrote it,
// payload. Writers go through a temporary file in the same directory and a
// rename, so a reader sees the old file or the new one and never a torn one;
// Write also syncs, so that holds across a power cut. Readers refuse a version
// newer than they know. The package does not lock: each file has one writer.
package statefile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// ErrNewer is returned by Read for a file written by a newer release.
var ErrNewer = errors.New("state file was written by a newer release")

// maxBytes bounds what Read loads: a state file is a record, not a database.
const maxBytes = 4 << 20

// Meta is what the envelope says about its payload.
type Meta struct {
	// Version is the payload's format version, 1 or more.
	Version int `json:"version"`
	// BootID is the kernel's boot id at the time of writing. A reader whose
	// payload names processes or namespaces must compare it with BootID().
	BootID string `json:"boot_id"`
}

type envelope struct {
	Meta
	Data json.RawMessage `json:"data"`
}

// Write replaces path with payload v in format version and waits until the
// disk has it. The file is readable by its owner only.
func Write(path string, version int, v any) error {
	return write(path, version, v, true)
}

// WriteVolatile is Write without waiting for the disk: for files under /run,
// which mean nothing after a reboot.
func WriteVolatile(path string, version int, v any) error {
	return write(path, version, v, false)
}

// reservedBytes is what Reserve sets aside.
const reservedBytes = 4 << 10

// Reserve sets space aside for a file that WriteReserved will write later, on
// a file system that may be full by then.
func Reserve(path string) error {
	blank := bytes.Repeat([]byte{' '}, reservedBytes)
	if err := os.WriteFile(reserved(path), blank, 0o600); err != nil {
		return fmt.Errorf("reserve state file %q: %w", path, err)
	}
	return nil
}

func reserved(path string) string { return path + ".reserved" }

// WriteReserved is WriteVolatile into the space that Reserve set aside. The
// payload must be a small one.
func WriteReserved(path string, version int, v any) error {
	raw, err := encode(path, version, v)
	if err != nil {
		return err
	}
	if len(raw) > reservedBytes {
		return fmt.Errorf("write state file %q: %d bytes exceed the %d reserved", path, len(raw), reservedBytes)
	}
	f, err := os.OpenFile(reserved(path), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("write state file %q: %w", path, err)
	}
	_, err = f.WriteAt(raw, 0) // blanks follow, which JSON ignores
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(reserved(path), path)
	}
	if err != nil {
		return fmt.Errorf("write state file %q: %w", path, err)
	}
	return nil
}

func write(path string, version int, v any, durable bool) error {
	raw, err := encode(path, version, v)
	if err != nil {
		return err
	}
	if err := replace(path, raw, durable); err != nil {
		return fmt.Errorf("write state file %q: %w", path, err)
	}
	return nil
}

func encode(path string, version int, v any) ([]byte, error) {
	bootID, err := BootID()
	if err != nil {
		return nil, err
	}
	data, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode state file %q: %w", path, err)
	}
	raw, err := json.Marshal(envelope{Meta{version, bootID}, data})
	if err != nil {
		return nil, fmt.Errorf("encode state file %q: %w", path, err)
	}
	return raw, nil
}

// replace puts raw at path by way of a temporary file, removing it on error.
func replace(path string, raw []byte, durable bool) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(tmp.Name()))
		}
	}()
	_, err = tmp.Write(raw)
	if err == nil && durable {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if err = os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	if !durable {
		return nil
	}
	// The rename is what makes the new content current: a failure after it
	// must not remove anything, so it is reported without the clean-up.
	dir, derr := os.Open(filepath.Dir(path))
	if derr != nil {
		return nil
	}
	_ = dir.Sync() // tmpfs and some network file systems cannot; the rename stands
	return dir.Close()
}

// Read loads path into v. It returns an error wrapping os.ErrNotExist if the
// file is missing and one wrapping ErrNewer if its version is above max.
func Read(path string, max int, v any) (Meta, error) {
	f, err := os.Open(path)
	if err != nil {
		return Meta{}, fmt.Errorf("read state file: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxBytes+1))
	if err != nil {
		return Meta{}, fmt.Errorf("read state file %q: %w", path, err)
	}
	if len(raw) > maxBytes {
		return Meta{}, fmt.Errorf("read state file %q: larger than %d bytes", path, maxBytes)
	}
	var e envelope
	if err := json.Unmarshal(raw, &e); err != nil {
		return Meta{}, fmt.Errorf("decode state file %q: %w", path, err)
	}
	if e.Version > max {
		return e.Meta, fmt.Errorf("read state file %q: version %d, newest known %d: %w", path, e.Version, max, ErrNewer)
	}
	if e.Version < 1 {
		return e.Meta, fmt.Errorf("read state file %q: no version", path)
	}
	if err := json.Unmarshal(e.Data, v); err != nil {
		return e.Meta, fmt.Errorf("decode state file %q: %w", path, err)
	}
	return e.Meta, nil
}

// BootID returns the kernel's random id of this boot (proc(5),
// /proc/sys/kernel/random/boot_id).
var BootID = sync.OnceValues(func() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
})
