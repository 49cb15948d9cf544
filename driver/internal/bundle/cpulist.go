package bundle

import (
	"errors"
	"strconv"
	"strings"
)

// checkCPUList refuses what is not the kernel's list format, as in "0-3,8"
// (Documentation/admin-guide/cgroup-v2.rst, cpuset.cpus); "" is allowed.
func checkCPUList(list string) error {
	if list == "" {
		return nil
	}
	for part := range strings.SplitSeq(list, ",") {
		low, high, isRange := strings.Cut(part, "-")
		if !isRange {
			high = low
		}
		a, errA := cpuNumber(low)
		b, errB := cpuNumber(high)
		if errA != nil || errB != nil || a > b {
			return errors.New(`not a list of numbers and ranges such as "0-3,8"`)
		}
	}
	return nil
}

// cpuNumber parses one CPU's number, digits only.
func cpuNumber(s string) (uint64, error) {
	return strconv.ParseUint(s, 10, 16)
}
