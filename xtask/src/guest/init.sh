#!/bin/busybox sh
# First stage, from the initramfs: loads the modules, lays a writable layer over the host's
# root file system, and goes there.

die() {
	# as the kernel's own message: a line on the terminal would be lost at power-off
	echo "<0>reverbs: $*" >/dev/kmsg
	busybox poweroff -f
}

busybox mount -t devtmpfs dev /dev
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
. /reverbs/settings

for module in /modules/*.ko; do
	busybox insmod "$module" || die "cannot load $module"
done

busybox mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose root /lower ||
	die "cannot mount the host's root file system"
busybox mount -t tmpfs -o mode=755,size=90% upper /upper
busybox mkdir /upper/top /upper/work
busybox mount -t overlay -o lowerdir=/lower,upperdir=/upper/top,workdir=/upper/work root /root ||
	die "cannot lay the writable layer"

# What the volatile file systems below would hide stays reachable here.
busybox mount --bind /root /plain
busybox mkdir -p /root/proc /root/sys /root/dev /root/run /root/tmp /root/usr/lib/modules
busybox mount --move /proc /root/proc
busybox mount --move /sys /root/sys
busybox mount --move /dev /root/dev
busybox mkdir -p /root/dev/pts /root/dev/shm
# udev's part
busybox ln -s /proc/self/fd /root/dev/fd
busybox ln -s fd/0 /root/dev/stdin
busybox ln -s fd/1 /root/dev/stdout
busybox ln -s fd/2 /root/dev/stderr
busybox mount -t devpts -o gid=5,mode=620,ptmxmode=666 pts /root/dev/pts
busybox mount -t tmpfs -o mode=1777,nosuid,nodev shm /root/dev/shm
busybox mount -t tmpfs -o mode=755 run /root/run
busybox mount -t tmpfs -o mode=1777 tmp /root/tmp
busybox mount --bind "/plain$modules" /root/usr/lib/modules || die "cannot reach $modules"

eval "set -- $hidden"
for folder; do
	busybox mkdir -p "/root$folder"
	busybox mount --bind "/plain$folder" "/root$folder" || die "cannot reach $folder"
done
busybox umount /plain

busybox mkdir -p /root/mnt/share
busybox mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=mmap share /root/mnt/share ||
	die "cannot mount the share"

busybox cp -r /reverbs /root/run/reverbs
busybox cp /bin/busybox /root/run/reverbs/busybox
exec busybox switch_root /root /run/reverbs/busybox sh /run/reverbs/main
