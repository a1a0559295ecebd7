//! Where the trainer computes: `--device auto|cpu|cuda:N`.

use candle_core::Device;
use trommel_core::error::{Error, Result};

/// The device that `text` names. `auto` is the first GPU where the program was built with `--features cuda` and one is
/// present, and the CPU otherwise.
pub fn parse(text: &str) -> Result<Device> {
    match text {
        "auto" => Ok(Device::cuda_if_available(0).unwrap_or(Device::Cpu)),
        "cpu" => Ok(Device::Cpu),
        "cuda" => cuda(0),
        _ => match text.strip_prefix("cuda:").and_then(|number| number.parse().ok()) {
            Some(number) => cuda(number),
            None => Err(Error::config(format!("unknown device `{text}`")).hint("use `auto`, `cpu` or `cuda:N`")),
        },
    }
}

fn cuda(number: usize) -> Result<Device> {
    Device::new_cuda(number).map_err(|e| {
        Error::config(format!("the device `cuda:{number}` cannot be used"))
            .source(e)
            .hint("build with `--features cuda` on a machine with an NVIDIA GPU, or use `--device cpu`")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed() {
        assert!(parse("cpu").unwrap().is_cpu());
        assert!(parse("auto").is_ok());
        for unknown in ["gpu", "cuda:x", ""] {
            assert_eq!(parse(unknown).unwrap_err().exit_code(), 2, "{unknown}");
        }
    }
}
