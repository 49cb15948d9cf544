# shellcheck shell=bash disable=SC2034,SC2154 # sourced: see run and stop
# What deploy/dev/run and deploy/dev/stop both know of the development agent:
# where it keeps things and whether it lives. Sourced by bash, with $root set.
#
# Everything is named after the port, so that agents of several checkouts can
# live side by side. Nothing of an agent that listens elsewhere is touched.

port=${BIVOUAC_DEV_PORT:-14646}
if ! [[ $port =~ ^[1-9][0-9]{3,4}$ ]] || ((port > 65533)); then
	echo "BIVOUAC_DEV_PORT: \"$port\" is not a port from 1000 to 65533" >&2
	exit 2
fi
address=http://127.0.0.1:$port

# Sockets lie below these two, and a socket's path is short.
data=/var/lib/bivouac-dev-$port # agent.{hcl,log,pid}, Nomad's data, images
run=/run/bivouac-dev-$port      # run_dir of the driver

# With cgroup v1 Nomad knows one parent only, "nomad", for all agents.
cgroup=bivouac-dev-$port.slice
bridge=bvdev$port
subnet=172.27.$((port % 256)).0/24

# The caller's Nomad settings are for another agent, and Nomad's fingerprint of
# AWS fails, the agent with it, on a certificate bundle that is not there.
unset "${!NOMAD_@}" AWS_CA_BUNDLE
export NOMAD_ADDR=$address NOMAD_CLI_SHOW_HINTS=0

nomad() { "$root/build/tools/nomad" "$@"; }

die() {
	printf '%s\n' "$1" >&2
	if [ $# -gt 1 ]; then printf 'hint: %s\n' "$2" >&2; fi
	exit 1
}

# lock_data keeps other runs and stops away until this one ends.
lock_data() {
	exec {lock}<"$data"
	flock -n "$lock" || die "another make run or make stop is at work on $data"
}

# started prints the start time of process $1, in ticks since boot.
started() {
	local stat
	stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
	# The name, in parentheses, may hold anything: count fields after it.
	# shellcheck disable=SC2086
	set -- ${stat##*)}
	# Z and X have ended and wait for their parent.
	[[ $1 != [ZX] ]] && echo "${20}"
}

boot() { cat /proc/sys/kernel/random/boot_id; }

# agent_pid prints the pid of our agent, if it lives: a number alone may have
# passed to another process, so start time and boot must be the same.
agent_pid() {
	local pid start id
	read -r pid start id <"$data/agent.pid" || return 1
	[ "$id" = "$(boot)" ] && [ "$(started "$pid")" = "$start" ] && echo "$pid"
} 2>/dev/null

# end_agent ends our agent as systemd would, and its sandboxes go on.
end_agent() {
	local pid=$1 i
	kill "$pid"
	for ((i = 0; i < 100; i++)); do
		agent_pid >/dev/null || return 0
		sleep 0.1
	done
	kill -KILL "$pid"
}

# foreign prints the checkout that the directories belong to, if it is another
# one and still there.
foreign() {
	local other
	other=$(cat "$data/checkout" 2>/dev/null) || return 1
	[ "$other" != "$root" ] && [ -d "$other" ] && echo "$other"
}
