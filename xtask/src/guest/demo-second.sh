# The second machine, which has only a device of another name: brings the job back.
set -e
cd /mnt/share/job

# Soft-RoCE counts from the same number after every boot: others have used this device before.
for port in 18601 18602 18603 18604 18605; do
	timeout 3 ibv_rc_pingpong -d rdma9 -g 1 -p $port >/dev/null 2>&1 &
done
wait

"$REVERBS" restart "$(cat image)" --wait --output job.out >root 2>restart.log &
restart=$!
failed() {
	cat restart.log >&2
	exit 1
}

running() {
	[ -s root ] && "$REVERBS" status "$(cat root)" --json >status-after.json 2>/dev/null &&
		grep -q '"phase": *"[Rr]unning"' status-after.json
}
until running; do
	kill -0 $restart 2>/dev/null || failed
	sleep 0.5
done
wait $restart || failed
