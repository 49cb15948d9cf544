package driver

import (
	"time"

	"github.com/bivouac-run/bivouac/internal/version"
	"github.com/hashicorp/nomad/plugins/base"
	"github.com/hashicorp/nomad/plugins/drivers"
	"github.com/hashicorp/nomad/plugins/drivers/fsisolation"
	"github.com/hashicorp/nomad/plugins/shared/hclspec"
)

// Name is the driver's name in job files.
const Name = "gvisor"

// Defaults of the plugin configuration. The schema below repeats none of them:
// it is built from these.
const (
	defaultStateDir     = "/var/lib/bivouac"
	defaultRunDir       = "/run/bivouac"
	defaultPlatform     = "systrap"
	defaultStartTimeout = "60s"
	defaultPullTimeout  = "5m"
	// defaultPidsLimit bounds a fork bomb while leaving room for the host
	// threads that gVisor itself needs, about one per thread of the task.
	defaultPidsLimit = 4096
)

func pluginInfo() *base.PluginInfoResponse {
	return &base.PluginInfoResponse{
		Type:              base.PluginTypeDriver,
		PluginApiVersions: []string{drivers.ApiVersion010},
		PluginVersion:     version.Version,
		Name:              Name,
	}
}

// capabilities say nil MountConfigs, which means all of them, and false for
// DynamicWorkloadUsers, which would overrule the user an image names.
func capabilities() *drivers.Capabilities {
	return &drivers.Capabilities{
		SendSignals: true,
		Exec:        true,
		FSIsolation: fsisolation.Image,
		NetIsolationModes: []drivers.NetIsolationMode{
			drivers.NetIsolationModeGroup,
			drivers.NetIsolationModeTask,
			drivers.NetIsolationModeNone,
		},
	}
}

// pluginSpec is the schema of the `config` in the agent's plugin block.
var pluginSpec = hclspec.NewObject(map[string]*hclspec.Spec{
	"runsc_path":    hclspec.NewAttr("runsc_path", "string", false),
	"shim_path":     hclspec.NewAttr("shim_path", "string", false),
	"state_dir":     stringDefault("state_dir", defaultStateDir),
	"run_dir":       stringDefault("run_dir", defaultRunDir),
	"platform":      stringDefault("platform", defaultPlatform),
	"image_dirs":    hclspec.NewAttr("image_dirs", "list(string)", false),
	"start_timeout": stringDefault("start_timeout", defaultStartTimeout),
	"pids_limit":    hclspec.NewAttr("pids_limit", "number", false),
})

// taskSpec is the schema of a task's `config`.
var taskSpec = hclspec.NewObject(map[string]*hclspec.Spec{
	"image":              hclspec.NewAttr("image", "string", true),
	"platform":           hclspec.NewAttr("platform", "string", false),
	"image_pull_timeout": stringDefault("image_pull_timeout", defaultPullTimeout),
	"entrypoint":         hclspec.NewAttr("entrypoint", "list(string)", false),
	"command":            hclspec.NewAttr("command", "string", false),
	"args":               hclspec.NewAttr("args", "list(string)", false),
	"work_dir":           hclspec.NewAttr("work_dir", "string", false),
	"hostname":           hclspec.NewAttr("hostname", "string", false),
	"ports":              hclspec.NewAttr("ports", "list(string)", false),
	"readonly_rootfs":    hclspec.NewAttr("readonly_rootfs", "bool", false),
	"pids_limit":         hclspec.NewAttr("pids_limit", "number", false),
	"cpu_hard_limit":     hclspec.NewAttr("cpu_hard_limit", "bool", false),
	"cpu_cfs_period":     hclspec.NewAttr("cpu_cfs_period", "number", false),
})

func stringDefault(name, value string) *hclspec.Spec {
	return hclspec.NewDefault(hclspec.NewAttr(name, "string", false), hclspec.NewLiteral(`"`+value+`"`))
}

// PluginConfig is the decoded plugin configuration.
type PluginConfig struct {
	// RunscPath and ShimPath are absolute paths of the two programs; empty
	// means beside the plugin's own executable, then (runsc only) on PATH.
	RunscPath string `codec:"runsc_path"`
	ShimPath  string `codec:"shim_path"`
	// StateDir keeps what survives a reboot: images. RunDir keeps what does
	// not: tasks, sockets.
	StateDir string `codec:"state_dir"`
	RunDir   string `codec:"run_dir"`
	// Platform is systrap or kvm.
	Platform string `codec:"platform"`
	// ImageDirs are host directories that jobs may load oci: and
	// docker-archive: images from by absolute path.
	ImageDirs []string `codec:"image_dirs"`
	// StartTimeout bounds the start of a sandbox once its image is there.
	StartTimeout string `codec:"start_timeout"`
	// PidsLimit is the limit of tasks that set none; 0 means 4096.
	PidsLimit int64 `codec:"pids_limit"`

	startTimeout time.Duration
}

// TaskConfig is a task's decoded `config`.
type TaskConfig struct {
	// Image is a registry reference, oci:PATH[:tag] or
	// docker-archive:PATH[:tag].
	Image string `codec:"image"`
	// Platform is os/arch[/variant]; empty means the node's.
	Platform string `codec:"platform"`
	// ImagePullTimeout bounds getting the image.
	ImagePullTimeout string `codec:"image_pull_timeout"`
	// Entrypoint, Command and Args mean what they mean to Docker.
	Entrypoint []string `codec:"entrypoint"`
	Command    string   `codec:"command"`
	Args       []string `codec:"args"`
	WorkDir    string   `codec:"work_dir"`
	// Hostname is the name inside; empty means the group network's, or the
	// first 8 characters of the allocation's ID.
	Hostname string `codec:"hostname"`
	// Ports are labels of the group network's ports that this task serves.
	// Needed only where several gvisor tasks share a network: without, the
	// first by name gets what no other claims.
	Ports          []string `codec:"ports"`
	ReadonlyRootfs bool     `codec:"readonly_rootfs"`
	// PidsLimit bounds the sandbox's host threads; 0 means the plugin's
	// default.
	PidsLimit int64 `codec:"pids_limit"`
	// CPUHardLimit makes the task's CPU share a ceiling too, enforced over
	// CPUCFSPeriod microseconds (0 means 100000).
	CPUHardLimit bool   `codec:"cpu_hard_limit"`
	CPUCFSPeriod uint64 `codec:"cpu_cfs_period"`

	pullTimeout time.Duration
}
