#!/bin/sh
# First process where it is no systemd: sets the test host up, runs the command, turns the machine off.
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sys /sys
mount -t devtmpfs -o nosuid dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o nosuid,noexec,gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev,mode=1777 shm /dev/shm
mount -t tmpfs -o nosuid,nodev,mode=755 run /run
mount -t tmpfs -o nosuid,nodev,mode=1777 tmp /tmp
mount -t cgroup2 -o nosuid,nodev,noexec cgroup /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
for name in stdin:0 stdout:1 stderr:2; do ln -s "/proc/self/fd/${name#*:}" "/dev/${name%:*}"; done

for module in virtio_console virtio_rng kvm_amd kvm_intel tun loop dm_mod; do
    modprobe -q "$module"
done
[ -e /dev/kvm ] && chmod 0666 /dev/kvm
ip link set lo up
hostname testhost

/mnt/runner
sync
busybox poweroff -f
