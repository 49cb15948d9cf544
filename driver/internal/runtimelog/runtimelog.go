// Package runtimelog reads the JSON log in which runsc says why a command
// failed. It is apart from package runsc because the shim, which must stay
// small, reads such logs too.
package runtimelog

import (
	"encoding/json"
	"io"
	"os"
)

// maxBytes bounds what is read: runsc logs one short record per failure.
const maxBytes = 64 << 10

// LastError returns the message of the last error in a log, whose records may
// follow each other without a newline, or "".
func LastError(log io.Reader) string {
	dec := json.NewDecoder(io.LimitReader(log, maxBytes))
	var last string
	for {
		var rec struct{ Msg, Level string }
		if err := dec.Decode(&rec); err != nil {
			return last
		}
		if rec.Level == "error" {
			last = rec.Msg
		}
	}
}

// LastErrorIn is LastError of the log at path, "" if it cannot be opened.
func LastErrorIn(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()
	return LastError(f)
}
