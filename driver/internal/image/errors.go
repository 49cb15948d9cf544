package image

import (
	"context"
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// Causes of a failed Get, for errors.Is. The error text carries the details.
var (
	// ErrNotFound means that the image, tag, file or blob does not exist.
	ErrNotFound = errors.New("not found")
	// ErrDigestMismatch means that bytes do not hash to the digest that named them.
	ErrDigestMismatch = errors.New("digest mismatch")
	// ErrUnauthorized means that the registry wants credentials, or refused ours.
	ErrUnauthorized = errors.New("registry denied access")
	// ErrCorrupt means that a manifest, config, layer or store file is malformed.
	ErrCorrupt = errors.New("corrupt image")
	// ErrUnsafe means that a layer holds an entry that must not be unpacked, such as one that leaves the root.
	ErrUnsafe = errors.New("unsafe image")
	// ErrTooLarge means that the image exceeds a limit of the store.
	ErrTooLarge = errors.New("image too large")
	// ErrNoSpace means that the file system of the store, or its quota, is full.
	ErrNoSpace = errors.New("no space left in image store")
	// ErrUnavailable means that the registry could not be reached, stalled, or answered 429 or 5xx.
	ErrUnavailable = errors.New("registry unavailable")
	// ErrInvalidReference means that the reference cannot be parsed, or does not pick one image.
	ErrInvalidReference = errors.New("invalid image reference")
	// ErrNotAllowed means that a local path lies outside what the task may use.
	ErrNotAllowed = errors.New("path not allowed")
	// ErrPlatform means that the image does not exist for the wanted platform.
	ErrPlatform = errors.New("no image for platform")
	// ErrClosed means that the store was closed.
	ErrClosed = errors.New("image store closed")
)

// Retryable reports whether the same Get may succeed later without a change to
// the job: network trouble, a full disk, or a timeout.
func Retryable(err error) bool {
	if errors.Is(err, ErrUnavailable) || errors.Is(err, ErrNoSpace) || errors.Is(err, context.DeadlineExceeded) {
		return true
	}
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// diskError wraps the error of a file system call in the sentinel it stands for.
func diskError(op string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%s: %w: %w", op, ErrNoSpace, err)
	case errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.ELOOP):
		return fmt.Errorf("%s: %w: %w", op, ErrUnsafe, err)
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EMLINK):
		return fmt.Errorf("%s: %w: %w", op, ErrCorrupt, err)
	}
	return fmt.Errorf("%s: %w", op, err)
}
