#!/bin/busybox sh
# First process of the test host: loads what its root needs, mounts it, hands over to the drive's init.
busybox=/bin/busybox
$busybox mount -t devtmpfs dev /dev
while read -r module; do
    $busybox insmod "/modules/$module" || echo "test host: cannot load $module"
done < /modules/order
$busybox mount -t ext4 /dev/vda /root && $busybox mount -t ext4 -o ro /dev/vdb /root/mnt || {
    echo "test host: cannot mount its drives"
    $busybox poweroff -f
}
exec $busybox switch_root /root /mnt/init
