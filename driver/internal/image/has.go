package image

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Has says whether the root has something at name. Symbolic links are followed
// inside the root and cannot leave it.
func (i *Image) Has(name string) (bool, error) {
	root, err := openRoot(i.Root)
	if err != nil {
		return false, fmt.Errorf("look up %q in image %q: %w", name, i.Ref, err)
	}
	defer unix.Close(root)
	fd, err := resolve(root, name, unix.O_PATH)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look up %q in image %q: %w", name, i.Ref, err)
	}
	return true, unix.Close(fd)
}
