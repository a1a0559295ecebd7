//! Makes a static table: `cargo run --release -p trommel-embed --example distill -- ENCODER OUTPUT [DIMENSIONS]`.

use std::path::Path;

use trommel_core::error::{Error, Result};
use trommel_core::progress::Silent;
use trommel_embed::distill::{DEFAULT_DIMENSIONS, distill};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (encoder, output, dimensions) = match &arguments[..] {
        [encoder, output] => (encoder, output, DEFAULT_DIMENSIONS),
        [encoder, output, dimensions] => {
            let wrong = |e| Error::config("DIMENSIONS must be a number").source(e);
            (encoder, output, dimensions.parse().map_err::<Error, _>(wrong)?)
        }
        _ => return Err(Error::config("usage: distill ENCODER OUTPUT [DIMENSIONS]")),
    };
    let distilled = distill(Path::new(encoder), Path::new(output), dimensions, &Silent)?;
    eprintln!("{distilled:?}");
    Ok(())
}
