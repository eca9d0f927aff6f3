# Another pair: brings the job back. WHERE is the folder for what is seen; RENAMED the options that
# say which machine takes whose part.

# Soft-RoCE counts from the same number after every boot: others have used these devices before.
device=$(ls /sys/class/infiniband)
for node in $NODES; do
	ssh "$node" "for port in 1 2 3 4 5 6 7; do
			timeout 3 ibv_rc_pingpong -d $device -g 1 -p 1860\$port >/dev/null 2>&1 &
		done; wait"
done

rm -f end
"$REVERBS" restart "$(cat image)" $RENAMED --wait --output job.out >"$WHERE/root" 2>"$WHERE/restart.log" &
restart=$!
failed() {
	fail "$(cat "$WHERE/restart.log")"
}
running() {
	[ -s "$WHERE/root" ] &&
		"$REVERBS" status "$(cat "$WHERE/root")" --json >"$WHERE/status.json" 2>/dev/null &&
		[ "$(grep -c '"phase": "running"' "$WHERE/status.json")" -eq 4 ]
}
until running; do
	kill -0 $restart 2>/dev/null || failed
	sleep 0.5
done
note_status "$WHERE"
at_work $restart
touch end
wait $restart || failed
nothing_left
