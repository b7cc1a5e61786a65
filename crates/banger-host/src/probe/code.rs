//! What the probe's guest runs, in machine code, and the memory that it expects.

/// Where [`CODE`] lies; it is entered at its start in 32-bit protected mode.
pub(super) const CODE_AT: usize = 0x8000;
/// The port that a byte is written to at each stage.
pub(super) const STAGE_PORT: u16 = 0xf4;
/// What the stages are, from the first byte, 1, on.
pub(super) const STAGES: [&str; 5] = [
    "enter long mode",
    "change page tables",
    "return from an exception",
    "use SSE2",
    "take three timer interrupts",
];
/// The guest's memory, in bytes.
pub(super) const MEMORY: usize = 64 * 1024;

const UNDEFINED_VECTOR: usize = 6;
const TIMER_VECTOR: usize = 0x20;
const UNDEFINED_HANDLER: usize = 0xa6;
const TIMER_HANDLER: usize = 0xad;

#[rustfmt::skip]
pub(super) const CODE: [u8; 188] = [
    // In 32-bit protected mode, without paging:
    0x0f, 0x01, 0x15, 0x00, 0x70, 0x00, 0x00, // lgdt [0x7000]: our own GDT
    0x0f, 0x01, 0x1d, 0x10, 0x70, 0x00, 0x00, // lidt [0x7010]: our own IDT
    0x0f, 0x20, 0xe0, // mov eax,cr4
    0x0d, 0x20, 0x02, 0x00, 0x00, // or eax,0x220: PAE and SSE
    0x0f, 0x22, 0xe0, // mov cr4,eax
    0xb8, 0x00, 0x10, 0x00, 0x00, // mov eax,0x1000
    0x0f, 0x22, 0xd8, // mov cr3,eax: page tables
    0xb9, 0x80, 0x00, 0x00, 0xc0, // mov ecx,0xc0000080: EFER
    0x0f, 0x32, // rdmsr
    0x0d, 0x00, 0x01, 0x00, 0x00, // or eax,0x100: long mode
    0x0f, 0x30, // wrmsr
    0x0f, 0x20, 0xc0, // mov eax,cr0
    0x0d, 0x03, 0x00, 0x00, 0x80, // or eax,0x80000003: paging, protection
    0x83, 0xe0, 0xfb, // and eax,0xfffffffb: no emulated FPU
    0x0f, 0x22, 0xc0, // mov cr0,eax
    0xea, 0x44, 0x80, 0x00, 0x00, 0x08, 0x00, // jmp 0x08:long
    // In 64-bit mode:
    0xb8, 0x10, 0x00, 0x00, 0x00, // mov eax,0x10
    0x8e, 0xd8, // mov ds,eax
    0x8e, 0xc0, // mov es,eax
    0x8e, 0xd0, // mov ss,eax
    0xbc, 0x00, 0xf0, 0x00, 0x00, // mov esp,0xf000
    0xb0, 0x01, // mov al,1
    0xe6, 0xf4, // out 0xf4,al: LONG_MODE
    0xb8, 0x00, 0x40, 0x00, 0x00, // mov eax,0x4000
    0x0f, 0x22, 0xd8, // mov cr3,rax: the other page tables
    0xb0, 0x02, // mov al,2
    0xe6, 0xf4, // out 0xf4,al: PAGE_TABLES
    0x0f, 0x0b, // ud2: the exception
    0xb0, 0x03, // mov al,3
    0xe6, 0xf4, // out 0xf4,al: EXCEPTION
    0x66, 0x0f, 0xef, 0xc0, // pxor xmm0,xmm0
    0xb0, 0x04, // mov al,4
    0xe6, 0xf4, // out 0xf4,al: SSE2
    0xb0, 0x11, // mov al,0x11: first controller, four words follow
    0xe6, 0x20, // out 0x20,al
    0xb0, 0x20, // mov al,0x20: its vectors start at 0x20
    0xe6, 0x21, // out 0x21,al
    0xb0, 0x04, // mov al,0x4
    0xe6, 0x21, // out 0x21,al
    0xb0, 0x01, // mov al,0x1
    0xe6, 0x21, // out 0x21,al
    0xb0, 0xfe, // mov al,0xfe: only line 0
    0xe6, 0x21, // out 0x21,al
    0xb0, 0x34, // mov al,0x34: timer 0, rate generator
    0xe6, 0x43, // out 0x43,al
    0xb0, 0x00, // mov al,0: every 4096 ticks, 3.4 ms
    0xe6, 0x40, // out 0x40,al
    0xb0, 0x10, // mov al,0x10
    0xe6, 0x40, // out 0x40,al
    // Until three ticks have come:
    0xfb, // sti
    0xf4, // hlt
    0xfa, // cli
    0x80, 0x3c, 0x25, 0x00, 0x90, 0x00, 0x00, 0x03, // cmp BYTE PTR 0x9000,0x3
    0x72, 0xf3, // jb tick
    0xb0, 0x05, // mov al,5
    0xe6, 0xf4, // out 0xf4,al: TIMER
    // Never gets further:
    0xf4, // hlt
    0xeb, 0xfd, // jmp stop
    // 0xa6: the handler of an undefined instruction steps over it:
    0x48, 0x83, 0x04, 0x24, 0x02, // add QWORD PTR [rsp],0x2
    0x48, 0xcf, // iretq
    // 0xad: the handler of the timer counts and tells the interrupt controller:
    0x50, // push rax
    0xfe, 0x04, 0x25, 0x00, 0x90, 0x00, 0x00, // inc BYTE PTR 0x9000
    0xb0, 0x20, // mov al,0x20
    0xe6, 0x20, // out 0x20,al
    0x58, // pop rax
    0x48, 0xcf, // iretq
];

/// The memory at the start: tables and code, each at the place that the code names.
pub(super) fn image() -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE_PAGE: u64 = 1 << 7;
    let mut memory = vec![0; MEMORY];
    let mut put = |at: usize, words: &[u64]| {
        for (index, word) in words.iter().enumerate() {
            memory[at + index * 8..][..8].copy_from_slice(&word.to_le_bytes());
        }
    };
    // Two roots, one tree: the first 2 MiB, each address its own.
    put(0x1000, &[0x2000 | PRESENT_WRITABLE]);
    put(0x4000, &[0x2000 | PRESENT_WRITABLE]);
    put(0x2000, &[0x3000 | PRESENT_WRITABLE]);
    put(0x3000, &[PRESENT_WRITABLE | LARGE_PAGE]);
    // Nothing, 64-bit code, data, 32-bit code.
    put(
        0x5000,
        &[
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_9b00_0000_ffff,
        ],
    );
    for (vector, handler) in [
        (UNDEFINED_VECTOR, UNDEFINED_HANDLER),
        (TIMER_VECTOR, TIMER_HANDLER),
    ] {
        // A present 64-bit interrupt gate to selector 8; all handlers lie below 64 KiB.
        let gate = (CODE_AT + handler) as u64 | 8 << 16 | 0x8e00 << 32;
        put(0x6000 + vector * 16, &[gate, 0]);
    }
    // Size less one and address of the GDT and the IDT.
    put(0x7000, &[0x5000 << 16 | (4 * 8 - 1)]);
    put(0x7010, &[0x6000 << 16 | (64 * 16 - 1)]);
    memory[CODE_AT..][..CODE.len()].copy_from_slice(&CODE);
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handlers_and_jump_target_are_where_the_tables_say() {
        // `add qword [rsp], 2` and `push rax`; the far jump goes to the `mov` of the data selector.
        assert_eq!(CODE[UNDEFINED_HANDLER..][..5], [0x48, 0x83, 0x04, 0x24, 2]);
        assert_eq!(CODE[TIMER_HANDLER], 0x50);
        let jump = CODE.iter().position(|&byte| byte == 0xea).unwrap();
        let target = u32::from_le_bytes(CODE[jump + 1..][..4].try_into().unwrap()) as usize;
        assert_eq!(target, CODE_AT + jump + 7);
        let memory = image();
        assert_eq!(
            memory[0x6000 + 6 * 16..][..8],
            [0xa6, 0x80, 8, 0, 0, 0x8e, 0, 0]
        );
        assert_eq!(memory[0x7000..][..6], [31, 0, 0, 0x50, 0, 0]);
    }
}
