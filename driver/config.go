package driver

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/bivouac-run/bivouac/driver/internal/bundle"
)

// validate checks the plugin configuration and fills in what is derived. It
// returns every problem, not the first.
func (c *PluginConfig) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, p := range []struct{ key, value string }{
		{"runsc_path", c.RunscPath}, {"shim_path", c.ShimPath}, {"state_dir", c.StateDir}, {"run_dir", c.RunDir},
	} {
		if p.value != "" && !filepath.IsAbs(p.value) {
			bad("%s: %q is not an absolute path", p.key, p.value)
		}
	}
	for _, dir := range c.ImageDirs {
		if !filepath.IsAbs(dir) {
			bad("image_dirs: %q is not an absolute path", dir)
		}
	}
	if strings.ContainsAny(c.RunDir, ",:\\ ") {
		bad("run_dir: %q has a character that runsc or overlayfs cannot take", c.RunDir)
	}
	// Sockets of runsc live below run_dir, and a socket's path is short.
	const longestRunDir = 40
	if len(c.RunDir) > longestRunDir {
		bad("run_dir: %q is longer than %d bytes", c.RunDir, longestRunDir)
	}
	if c.Platform != "systrap" && c.Platform != "kvm" {
		bad("platform: %q is neither systrap nor kvm", c.Platform)
	}
	if c.PidsLimit < 0 {
		bad("pids_limit: %d is negative", c.PidsLimit)
	}
	if c.PidsLimit == 0 {
		c.PidsLimit = defaultPidsLimit
	}
	var err error
	if c.startTimeout, err = positiveDuration("start_timeout", c.StartTimeout); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// validate checks what the schema cannot. It returns every problem.
func (c *TaskConfig) validate() error {
	var errs []error
	var err error
	if c.Image == "" {
		errs = append(errs, errors.New(`image: set an image reference, such as "alpine:3"`))
	}
	if c.pullTimeout, err = positiveDuration("image_pull_timeout", c.ImagePullTimeout); err != nil {
		errs = append(errs, err)
	}
	if c.PidsLimit < 0 {
		errs = append(errs, fmt.Errorf("pids_limit: %d is negative", c.PidsLimit))
	}
	// The kernel's bounds (kernel/sched/core.c).
	const minPeriod, maxPeriod = 1000, 1000000
	if c.CPUCFSPeriod != 0 && (c.CPUCFSPeriod < minPeriod || c.CPUCFSPeriod > maxPeriod) {
		errs = append(errs, fmt.Errorf("cpu_cfs_period: %d is not within %d and %d microseconds", c.CPUCFSPeriod, minPeriod, maxPeriod))
	}
	if c.CPUCFSPeriod == 0 {
		c.CPUCFSPeriod = 100000
	}
	if c.Hostname != "" {
		if _, err := bundle.Hostname(c.Hostname); err != nil {
			errs = append(errs, fmt.Errorf("hostname: %w", err))
		}
	}
	return errors.Join(errs...)
}

func positiveDuration(key, value string) (time.Duration, error) {
	d, err := time.ParseDuration(value)
	if err != nil {
		return 0, fmt.Errorf("%s: %q is not a duration such as \"5m\"", key, value)
	}
	if d <= 0 {
		return 0, fmt.Errorf("%s: %q is not positive", key, value)
	}
	return d, nil
}
