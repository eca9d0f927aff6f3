# What the scripts for both pairs of machines use. NODES are the names of the two.
set -e
cd /mnt/share/job

fail() {
	echo "$*" >&2
	exit 1
}

packets() {
	ssh "$1" 'cat /sys/class/infiniband/*/ports/1/hw_counters/sent_pkts'
}

# Waits until the hardware of each node has sent a good deal more, or process $1 has ended.
at_work() {
	for node in $NODES; do
		goal=$(($(packets "$node") + 2000))
		until [ "$(packets "$node")" -ge $goal ]; do
			kill -0 "$1" 2>/dev/null || fail "the job has ended"
			sleep 0.5
		done
	done
}

# Notes how the processes of each node see their hardware: FOLDER/status-1.json and -2.
note_status() {
	number=1
	for node in $NODES; do
		ssh "$node" "$REVERBS" status --json >"$1/status-$number.json"
		number=$((number + 1))
	done
}

# Where no job is, nothing of one may be.
nothing_left() {
	for node in $NODES; do
		left=$(ssh "$node" 'pgrep -lx mpirun; pgrep -lx orted; pgrep -lx mpi_check
			nft list ruleset | grep -wE "drop|reject"
			lsns -n -t net | tail -n +2; true')
		[ -z "$left" ] || fail "left on $node: $left"
	done
}
