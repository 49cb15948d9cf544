package driver

import (
	"errors"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// unmountNullNetNS removes the mount that runsc keeps below its root for all
// sandboxes of a node.
func unmountNullNetNS(t *testing.T, runDir string) {
	t.Helper()
	err := unix.Unmount(filepath.Join(runDir, "runsc", "null-netns"), unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		t.Errorf("unmount null-netns: %v", err)
	}
}
