#!/bin/sh
# First process where it is to be systemd: says what is to run, and becomes it.
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t tmpfs -o nosuid,nodev,mode=755 run /run

count=/var/lib/testhost/boot
mkdir -p "${count%/*}" /run/testhost /run/systemd/system /run/systemd/system-generators
boot=$(($(cat "$count" 2> /dev/null || echo 0) + 1))
echo "$boot" > "$count"
if [ "$boot" -gt 9 ]; then
    echo "test host: it reboots without end"
    busybox poweroff -f
fi
# Without one systemd takes this for the first boot and enables all that is installed.
[ -s /etc/machine-id ] || tr -d - < /proc/sys/kernel/random/uuid > /etc/machine-id
echo testhost > /etc/hostname
for module in virtio_console kvm_amd kvm_intel tun loop dm_mod; do
    modprobe -q "$module"
done

cd /run/systemd/system
# An emulated processor is slow, and nothing here needs these.
for unit in \
    dev-hugepages.mount e2scrub_reap.service getty.target ldconfig.service modprobe@configfs.service \
    modprobe@dm_mod.service modprobe@drm.service modprobe@efi_pstore.service modprobe@fuse.service \
    modprobe@loop.service proc-sys-fs-binfmt_misc.automount serial-getty@ttyS0.service \
    sys-fs-fuse-connections.mount sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
    systemd-binfmt.service systemd-journal-flush.service systemd-modules-load.service systemd-pcrphase.service \
    systemd-pcrphase-sysinit.service systemd-pstore.service systemd-random-seed.service systemd-sysusers.service \
    systemd-tmpfiles-clean.timer systemd-update-utmp.service systemd-update-utmp-runlevel.service
do
    ln -s /dev/null "$unit"
done
# Nor most devices.
mkdir systemd-udev-trigger.service.d
cat > systemd-udev-trigger.service.d/testhost.conf << END
[Service]
ExecStart=
ExecStart=udevadm trigger --action=add --subsystem-match=block --subsystem-match=misc --subsystem-match=net
END
for generator in cryptsetup debug getty gpt-auto hibernate-resume integritysetup rc-local run \
    system-update sysv veritysetup
do
    ln -s /dev/null "/run/systemd/system-generators/systemd-$generator-generator"
done
ln -s /lib/systemd/system/multi-user.target default.target
mkdir multi-user.target.wants
ln -s ../testhost.service multi-user.target.wants/testhost.service
cat > testhost.service << END
[Unit]
Description=The command that this machine was booted for
Wants=systemd-logind.service systemd-user-sessions.service
After=systemd-logind.service systemd-user-sessions.service systemd-resolved.service

[Service]
Type=exec
Environment=TESTHOST_BOOT=$boot
ExecStart=/mnt/runner
# A daemon that the command leaves is no part of it.
KillMode=process
END
# Nobody is there to mend it.
for unit in emergency.service rescue.service; do
    printf '[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=busybox poweroff -f\n' > "$unit"
done
exec /lib/systemd/systemd
