#!/bin/sh
# Sets the test host up, runs the command, reports how it ended, and turns the machine off.
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

for port in /sys/class/virtio-ports/*; do
    case "$(cat "$port/name")" in
    stdout) stdout=/dev/${port##*/} ;;
    stderr) stderr=/dev/${port##*/} ;;
    status) status=/dev/${port##*/} ;;
    esac
done

# Programs that clear their environment find it here as well.
[ -e /mnt/bin/firecracker ] && ln -s /mnt/bin/firecracker /usr/local/bin/firecracker
if [ -d /mnt/lib ]; then
    echo /mnt/lib > /etc/ld.so.conf.d/testhost.conf
    ldconfig
fi

export HOME=/root LANG=C.UTF-8
export PATH=/mnt/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export BANGER_TESTHOST=1 BANGER_LIBEXEC=/mnt/bin BANGER_TEST_FIXTURES=/mnt/fixtures
cd /root
sh /mnt/command < /dev/null > "$stdout" 2> "$stderr"
echo $? > "$status"
sync
busybox poweroff -f
