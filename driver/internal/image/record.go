package image

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// formatVersion is the version of every file of the store. Newer ones are refused.
const formatVersion = 1

// storeRecord is version.json.
type storeRecord struct {
	Version int `json:"version"`
}

// imageRecord is image.json, written before its directory is put in place.
type imageRecord struct {
	Version        int    `json:"version"`
	Digest         string `json:"digest"`
	OS             string `json:"os,omitempty"`
	Architecture   string `json:"architecture,omitempty"`
	SkippedDevices int    `json:"skipped_devices,omitempty"`
	Config         Config `json:"config"`
}

// refRecord is a file of refs: what a reference last resolved to.
type refRecord struct {
	Version  int    `json:"version"`
	Ref      string `json:"ref"`
	Platform string `json:"platform"`
	Resolved string `json:"resolved"` // digest that the registry gave for Ref, maybe of an index
	Digest   string `json:"digest"`   // digest of the manifest for Platform
}

// refFile is the name of the record for a reference and platform.
func refFile(ref, platform string) string {
	h := sha256.Sum256([]byte(ref + "\n" + platform))
	return hex.EncodeToString(h[:]) + ".json"
}

// readRecord reads a versioned JSON file. The error is os.ErrNotExist if there is
// none, and ErrCorrupt if it cannot be read as one.
func readRecord(file string, v any) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := readLimited(f, file)
	if err != nil {
		return err
	}
	var version storeRecord
	if err := json.Unmarshal(data, &version); err != nil || version.Version < 1 {
		return fmt.Errorf("%w: %q is not a store file", ErrCorrupt, file)
	}
	if version.Version > formatVersion {
		return fmt.Errorf("%q has version %d, this build reads up to %d: upgrade bivouac or use another directory", file, version.Version, formatVersion)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("%w: %q is not a store file", ErrCorrupt, file)
	}
	return nil
}

// writeRecord replaces a file atomically. The caller keeps others from writing it.
func writeRecord(file string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write %q: %w", file, err)
	}
	temp := file + ".tmp"
	err = writeSynced(temp, data)
	if err == nil {
		err = os.Rename(temp, file)
	}
	if err != nil {
		os.Remove(temp) // what is left is overwritten next time
		return diskError("write record", err)
	}
	return syncDir(filepath.Dir(file))
}

func writeSynced(file string, data []byte) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return diskError("sync directory", err)
	}
	defer d.Close()
	return diskError("sync directory", d.Sync())
}
