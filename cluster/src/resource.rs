//! Amounts a service may use, with their units. `"512Mi"` in, bytes out.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Memory(pub u64);

/// Thousandths of one CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cpu(pub u32);

/// What a service may use and what is set aside for it; absent means no limit and nothing set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Resources {
    pub memory: Option<Memory>,
    pub cpu: Option<Cpu>,
}

/// The least memory a limit may name: the smallest Docker accepts.
pub const MEMORY_MIN: Memory = Memory(6 << 20);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    #[error("an amount of memory is a whole number and a unit: \"512Mi\"")]
    Form,
    #[error("`{0}` is no unit of memory; use Ki, Mi, Gi or Ti (or k, M, G, T for powers of 1000)")]
    Unit(String),
    #[error("that is more memory than can be counted")]
    TooMuch,
}

impl FromStr for Memory {
    type Err = MemoryError;
    fn from_str(text: &str) -> Result<Memory, MemoryError> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(MemoryError::Form);
        }
        let number: u64 = number.parse().map_err(|_| MemoryError::TooMuch)?;
        let factor: u64 = match unit {
            "" => return Err(MemoryError::Form),
            "B" => 1,
            "Ki" | "KiB" => 1 << 10,
            "Mi" | "MiB" => 1 << 20,
            "Gi" | "GiB" => 1 << 30,
            "Ti" | "TiB" => 1 << 40,
            "k" | "kB" => 1_000,
            "M" | "MB" => 1_000_000,
            "G" | "GB" => 1_000_000_000,
            "T" | "TB" => 1_000_000_000_000,
            other => return Err(MemoryError::Unit(other.to_owned())),
        };
        number.checked_mul(factor).map(Memory).ok_or(MemoryError::TooMuch)
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u64, &str); 4] = [(1 << 40, "Ti"), (1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")];
        for (size, unit) in UNITS {
            if self.0 >= size {
                let tenths = (u128::from(self.0) * 10 + u128::from(size) / 2) / u128::from(size);
                return if tenths % 10 == 0 {
                    write!(f, "{}{unit}", tenths / 10)
                } else {
                    write!(f, "{}.{}{unit}", tenths / 10, tenths % 10)
                };
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.0) / 1000.0)
    }
}
