#!/bin/sh
# Runs the command, shows what it writes, and reports how it ended; with a first process that reboots, in each boot.
for port in /sys/class/virtio-ports/*; do
    case "$(cat "$port/name")" in
    stdout) stdout=/dev/${port##*/} ;;
    stderr) stderr=/dev/${port##*/} ;;
    status) status=/dev/${port##*/} ;;
    esac
done

# Programs that clear their environment find it here as well.
[ -e /mnt/bin/firecracker ] && ln -sf /mnt/bin/firecracker /usr/local/bin/firecracker
if [ -d /mnt/lib ]; then
    echo /mnt/lib > /etc/ld.so.conf.d/testhost.conf
    ldconfig
fi

export HOME=/root LANG=C.UTF-8
export PATH=/mnt/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export BANGER_TESTHOST=1 BANGER_LIBEXEC=/mnt/bin BANGER_TEST_FIXTURES=/mnt/fixtures
cd /root
sh /mnt/command < /dev/null > "$stdout" 2> "$stderr"
code=$?

# The first boot that failed decides.
kept=/var/lib/testhost/code
mkdir -p "${kept%/*}"
[ "$code" = 0 ] || [ -e "$kept" ] || echo "$code" > "$kept"
next=
[ -e /run/testhost/next ] && next=$(cat /run/testhost/next)
sync
case "$next" in
reboot) exec systemctl --no-block reboot ;;
reset) echo b > /proc/sysrq-trigger ;;
*)
    [ -e "$kept" ] && code=$(cat "$kept")
    echo "$code" > "$status"
    busybox poweroff -f
    ;;
esac
