# Second stage, as process 1 over the host's root file system: makes the RDMA devices, runs
# the job, passes its status on, and powers off.

busybox=/run/reverbs/busybox

die() {
	# as the kernel's own message: a line on the terminal would be lost at power-off
	echo "<0>reverbs: $*" >/dev/kmsg
	$busybox poweroff -f
}

. /run/reverbs/settings
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root USER=root LOGNAME=root LANG=C.UTF-8
# There is no other user here.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

$busybox hostname "$name"
printf '127.0.0.1 localhost\n%s' "$hosts" >/etc/hosts
echo "$name" >/etc/hostname
$busybox ip link set lo up

# A device is a Soft-RoCE one over the network card, or else over a dummy network interface of
# its own: NAME@ADDRESS/PREFIX.
number=0
for device in $devices; do
	if [ "$network" ]; then
		interface=eth0
		modprobe virtio_net
	else
		interface=d$number
		number=$((number + 1))
		$busybox ip link add $interface type dummy
	fi &&
		$busybox ip addr add "${device#*@}" dev $interface &&
		$busybox ip link set $interface up &&
		rdma link add "${device%%@*}" type rxe netdev $interface ||
		die "cannot make the RDMA device $device"
done

ulimit -l unlimited
ulimit -Hn 1048576

# On the network is only the other machine, whose root may come in without a key or password.
if [ "$network" ]; then
	mkdir -p /etc/dropbear /etc/ssh/ssh_config.d
	echo root:::::::: >/etc/shadow.new
	mv /etc/shadow.new /etc/shadow
	printf '%s\n' 'StrictHostKeyChecking no' 'UserKnownHostsFile /dev/null' 'LogLevel ERROR' \
		>/etc/ssh/ssh_config.d/network.conf
	dropbear -R -B -e -m || die "no ssh server"
fi

out=$(echo /dev/vport*p1)
err=${out%1}2
control=${out%1}3

# Pipes, because a port can be opened only once and programs do open /dev/stderr.
$busybox mkfifo /run/reverbs/out /run/reverbs/err
$busybox cat /run/reverbs/out >$out &
cats=$!
$busybox cat /run/reverbs/err >$err &
cats="$cats $!"
exec 3>$control || die "no control channel"
echo up >&3

(
	exec </dev/null >/run/reverbs/out 2>/run/reverbs/err 3>&-
	cd "$folder" || exit 127
	eval "$environment"
	# the host's shell: busybox's would prefer its own ls, ip, mount to the host's
	exec $busybox setsid /bin/sh /run/reverbs/job
) &
wait $!
status=$?

# Whatever the job left running holds the pipes open: end it, kernel threads (children of
# process 2) aside. No program is started for that.
left=yes
while [ $left = yes ]; do
	left=no
	for entry in /proc/[0-9]*; do
		process=${entry#/proc/}
		case " 1 2 $cats " in *" $process "*) continue ;; esac
		read -r line 2>/dev/null <$entry/stat || continue
		case "$line" in *") "[A-Z]" 2 "* | *") Z "*) continue ;; esac
		kill -9 "$process" 2>/dev/null && left=yes
	done
done
wait $cats

cd /
$busybox sync
$busybox umount /mnt/share
echo "exit $status" >&3
$busybox poweroff -f
