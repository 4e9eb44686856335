#!/bin/busybox sh
# /init of the lab's guest: from power-on to "ready", then a command loop on the serial console.
# Lines that begin with "onequote-guest:" are for the lab; everything else is for people.

B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev
$B mount -t securityfs security /sys/kernel/security
exec </dev/ttyS0 >/dev/ttyS0 2>&1
$B stty -echo -onlcr </dev/ttyS0
$B ln -s /proc/self/fd /dev/fd

say() { echo "onequote-guest: $*"; }

read -r cmdline </proc/cmdline
disk=
policy=yes
shim=yes
for word in $cmdline; do
    case $word in
    lab.disk=*) disk=${word#lab.disk=} ;;
    lab.policy=*) policy=${word#lab.policy=} ;;
    lab.shim=*) shim=${word#lab.shim=} ;;
    esac
done

# What is executed or mapped as code from here on is measured, whatever the file system: a program
# copied to memory first must not be invisible.
if [ "$policy" = yes ]; then
    {
        echo "measure func=BPRM_CHECK"
        echo "measure func=FILE_MMAP mask=MAY_EXEC"
    } >/sys/kernel/security/ima/policy
fi

for module in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci \
    virtio_mmio virtio_blk vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport; do
    $B insmod /modules/$module.ko || say "module $module did not load"
done

shim_start() { [ -x /onequote-shim ] && /onequote-shim & }
shim_stop() { $B killall -q -9 onequote-shim; }
[ "$shim" = yes ] && shim_start

if [ -n "$disk" ]; then
    tries=0
    while [ ! -b "$disk" ] && [ $tries -lt 100 ]; do
        $B sleep 0.05
        tries=$((tries + 1))
    done
    # Read-only until the first `write`: a guest that writes nothing leaves its disk as it was.
    if $B mount -t ext4 -o ro "$disk" /disk; then
        for program in /disk/boot.d/*; do "$program" || say "$program failed"; done
    else
        say "no disk at $disk"
    fi
fi

# Kernel messages would tear the answers; `dmesg` asks for them.
$B dmesg -n 1
say "ready"

# One command a line: a number chosen by the asker, a word, its arguments. The answer stands between
# "begin NUMBER" and "end NUMBER STATUS".
while true; do
    read -r number word rest || { $B sleep 0.1; continue; }
    [ -n "$word" ] || continue
    say "begin $number"
    status=0
    case $word in
    run)
        # Splitting the line into path and arguments is the point.
        $rest </dev/null
        status=$?
        ;;
    sh)
        (eval "$rest") </dev/null
        status=$?
        ;;
    write)
        # write PATH TEXT: a new executable script; \n in TEXT begins a new line.
        path=${rest%% *}
        $B mount -o remount,rw /disk && printf '#!/bin/busybox sh\n%b\n' "${rest#* }" >"$path" &&
            $B chmod 755 "$path" && $B sync
        status=$?
        ;;
    cat-ima)
        $B base64 /sys/kernel/security/ima/binary_runtime_measurements
        status=$?
        ;;
    shim)
        case $rest in
        stop) shim_stop ;;
        start) shim_start ;;
        restart) shim_stop; shim_start ;;
        *) status=64 ;;
        esac
        ;;
    dmesg) $B dmesg ;;
    poweroff | reboot)
        say "end $number 0"
        $B umount /disk 2>/dev/null
        $B sync
        $B "$word" -f
        ;;
    *)
        echo "unknown command $word"
        status=64
        ;;
    esac
    say "end $number $status"
done
