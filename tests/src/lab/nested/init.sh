#!/bin/busybox sh
# /init of the nested host: drivers for its disk, its root file system, its own init.

B=/bin/busybox
$B mount -t devtmpfs dev /dev
for module in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk; do
    [ ! -e /modules/$module.ko ] || $B insmod /modules/$module.ko
done
# The bus finds its devices on its own time.
while [ ! -b /dev/vdb ]; do $B sleep 0.05; done
# A system that was suspended to disk goes on from there; the kernel looks whether there is one.
if [ -b /dev/vdc ]; then
    $B mkdir /sys && $B mount -t sysfs sysfs /sys
    $B cat /sys/block/vdc/dev >/sys/power/resume
    $B umount /sys
fi
$B mount -t ext4 -o ro /dev/vdb /root
$B mount --move /dev /root/dev
exec $B switch_root /root /sbin/init
