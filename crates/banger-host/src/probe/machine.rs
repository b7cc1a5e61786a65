//! The probe's guest: one virtual CPU that does what a kernel does first.

use super::code;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_pit_config, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::arch::x86_64::__cpuid_count;

/// A feature of the CPU: name, leaf, register (0 to 3: eax to edx), bit.
type Feature = (&'static str, u32, usize, u32);

/// Without these no 64-bit kernel of a distribution starts.
const NEEDED: [Feature; 9] = [
    ("msr", 1, 3, 5),
    ("pae", 1, 3, 6),
    ("cx8", 1, 3, 8),
    ("cmov", 1, 3, 15),
    ("fxsr", 1, 3, 24),
    ("sse2", 1, 3, 26),
    ("syscall", 0x8000_0001, 3, 11),
    ("nx", 0x8000_0001, 3, 20),
    ("lm", 0x8000_0001, 3, 29),
];
/// KVM passes these on wherever the CPU has them, so one that does not is not the KVM that guests need.
const PASSED_ON: [Feature; 6] = [
    ("sse3", 1, 2, 0),
    ("ssse3", 1, 2, 9),
    ("sse4_1", 1, 2, 19),
    ("sse4_2", 1, 2, 20),
    ("popcnt", 1, 2, 23),
    ("xsave", 1, 2, 26),
];

/// Runs the guest to its last stage. Takes for ever where KVM hangs.
///
/// # Errors
/// What went wrong, for people.
pub(super) fn run(kvm: &Kvm, on_stage: impl Fn(usize)) -> Result<(), String> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| format!("KVM does not say what its CPUs can do: {error}"))?;
    let guest = |leaf, register| guest_register(&supported, leaf, register);
    let needed = lacking(&NEEDED, guest);
    if !needed.is_empty() {
        return Err(format!(
            "its CPUs lack {}, which every kernel needs",
            needed.join(", ")
        ));
    }
    instructions(kvm, &supported, on_stage)?;
    let host: Vec<&str> = lacking(&PASSED_ON, host_register);
    let hidden: Vec<&str> = lacking(&PASSED_ON, guest)
        .into_iter()
        .filter(|name| !host.contains(name))
        .collect();
    if !hidden.is_empty() {
        return Err(format!(
            "it hides {} of this machine's CPU from guests, which KVM on a real machine does not",
            hidden.join(", ")
        ));
    }
    Ok(())
}

fn lacking(features: &[Feature], register: impl Fn(u32, usize) -> u32) -> Vec<&'static str> {
    features
        .iter()
        .filter(|&&(_, leaf, index, bit)| register(leaf, index) & (1 << bit) == 0)
        .map(|&(name, ..)| name)
        .collect()
}

fn guest_register(supported: &CpuId, leaf: u32, register: usize) -> u32 {
    supported
        .as_slice()
        .iter()
        .find(|entry| entry.function == leaf)
        .map_or(0, |entry| {
            [entry.eax, entry.ebx, entry.ecx, entry.edx][register]
        })
}

fn host_register(leaf: u32, register: usize) -> u32 {
    let leaf = __cpuid_count(leaf, 0);
    [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx][register]
}

fn instructions(kvm: &Kvm, supported: &CpuId, on_stage: impl Fn(usize)) -> Result<(), String> {
    let mut memory = Box::new(Memory([0; code::MEMORY]));
    memory.0.copy_from_slice(&code::image());
    // Declared after the memory, so gone before it.
    let (_vm, mut cpu) = machine(kvm, supported, &mut memory)
        .map_err(|error| format!("KVM does not make a virtual machine: {error}"))?;
    let mut reached = 0;
    loop {
        let next = code::STAGES.get(reached).copied().unwrap_or("end");
        match cpu.run() {
            Ok(VcpuExit::IoOut(code::STAGE_PORT, &[stage]))
                if usize::from(stage) == reached + 1 =>
            {
                reached += 1;
                on_stage(reached);
                if reached == code::STAGES.len() {
                    return Ok(());
                }
            }
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => {
                let exit = format!("{exit:?}");
                let at = cpu.get_regs().map_or(0, |registers| registers.rip);
                return Err(format!(
                    "a guest could not {next}: it stopped with {exit} at {at:#x}"
                ));
            }
            Err(error) if error.errno() == rustix::io::Errno::INTR.raw_os_error() => {}
            Err(error) => return Err(format!("a guest could not {next}: {error}")),
        }
    }
}

/// The guest's memory; KVM wants it to begin with a page.
#[repr(C, align(4096))]
struct Memory([u8; code::MEMORY]);

fn machine(
    kvm: &Kvm,
    supported: &CpuId,
    memory: &mut Memory,
) -> Result<(VmFd, VcpuFd), kvm_ioctls::Error> {
    let vm = kvm.create_vm()?;
    // Intel needs three pages of address space for itself; just below the firmware's place.
    vm.set_tss_address(0xfffb_d000)?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config::default())?;
    add_memory(&vm, memory)?;
    let cpu = vm.create_vcpu(0)?;
    cpu.set_cpuid2(supported)?;
    let mut special = cpu.get_sregs()?;
    let flat = |selector: u16, kind: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    special.cs = flat(0x18, 0b1011);
    for segment in [
        &mut special.ds,
        &mut special.es,
        &mut special.ss,
        &mut special.fs,
        &mut special.gs,
    ] {
        *segment = flat(0x10, 0b0011);
    }
    special.cr0 |= 1;
    cpu.set_sregs(&special)?;
    let mut general = cpu.get_regs()?;
    general.rip = code::CODE_AT as u64;
    general.rsp = 0xf000;
    general.rflags = 2;
    cpu.set_regs(&general)?;
    Ok((vm, cpu))
}

#[expect(unsafe_code, reason = "the guest gets memory of ours")]
fn add_memory(vm: &VmFd, memory: &mut Memory) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: code::MEMORY as u64,
        userspace_addr: memory.0.as_mut_ptr() as u64,
    };
    // SAFETY: the caller keeps `memory`, which has this size, until the machine is gone, and reads none of it.
    unsafe { vm.set_user_memory_region(region) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_cpu_lacks_is_named() {
        assert_eq!(lacking(&NEEDED, |_, _| u32::MAX), Vec::<&str>::new());
        let register = |leaf, index| {
            if (leaf, index) == (0x8000_0001, 3) {
                !(1 << 20)
            } else {
                u32::MAX
            }
        };
        assert_eq!(lacking(&NEEDED, register), ["nx"]);
        assert_eq!(lacking(&PASSED_ON, |_, _| 0).len(), 6);
    }
}
