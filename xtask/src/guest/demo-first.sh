# The first machine: starts the job, saves it in mid-run, ends it.
set -e
cd /mnt/share/job

export UCX_TLS=rc,self UCX_NET_DEVICES=rxe0:1
# Soft-RoCE's IPv4 address; and UCX would refuse Soft-RoCE's UD headers
export UCX_IB_GID_INDEX=1 UCX_UD_VERBS_ETH_DGID_CHECK=n
"$REVERBS" run --pid-file /run/job.pid -- mpirun -np 2 \
	--mca pml ucx --mca osc ucx --mca btl ^openib hpcc >job.out 2>&1 &
job=$!

# The longest part, in which the ranks exchange messages without a pause.
until grep -qs 'Begin of LatencyBandwidth' hpccoutf.txt; do
	kill -0 $job 2>/dev/null || { cat job.out >&2; exit 1; }
	sleep 0.5
done
sleep 5
root=$(cat /run/job.pid)
"$REVERBS" status "$root" --json >status-before.json
"$REVERBS" checkpoint "$root" --images /mnt/share/images --stop >image 2>checkpoint.log || {
	cat checkpoint.log >&2
	exit 1
}
if grep -q 'End of LatencyBandwidth' hpccoutf.txt; then
	echo 'the job was faster than the checkpoint' >&2
	exit 1
fi
