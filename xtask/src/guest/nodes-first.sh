# The first pair: starts the job, saves it while it runs on, then saves it and ends it.
export UCX_TLS=rc,self UCX_NET_DEVICES=rxe0:1
# Soft-RoCE's IPv4 address; and UCX would refuse Soft-RoCE's UD headers
export UCX_IB_GID_INDEX=1 UCX_UD_VERBS_ETH_DGID_CHECK=n
"$REVERBS" run --pid-file /run/job.pid -- mpirun --host n1:2,n2:2 \
	--mca pml ucx --mca osc ucx --mca btl ^openib --mca oob_tcp_if_include eth0 \
	-x UCX_TLS -x UCX_NET_DEVICES -x UCX_IB_GID_INDEX -x UCX_UD_VERBS_ETH_DGID_CHECK \
	"$CHECK" --until /mnt/share/job/end >job.out 2>&1 &
job=$!
until grep -qs '^ready' job.out; do
	kill -0 $job 2>/dev/null || fail "$(cat job.out)"
	sleep 0.5
done
root=$(cat /run/job.pid)
! pgrep -lx ssh || fail "ssh is among the processes of the job"
at_work $job
note_status first

save() {
	"$REVERBS" checkpoint "$root" --images /mnt/share/images "$@" 2>>first/checkpoint.log ||
		fail "$(cat first/checkpoint.log)"
}
save >/dev/null
at_work $job
save --stop >image
wait $job || true
nothing_left
