//! Which device takes the place of one that the job had: looked at before a restart, and decided in each process.

use super::message::DeviceChoice;

/// The device asked for; else that of the same name; else the one that has one of the addresses; else the only one.
///
/// # Errors
/// In words: there is none, or more than one.
pub fn choose(
    first: &str,
    choices: &[DeviceChoice],
    names: &[String],
    has_address: impl Fn(&str) -> bool,
) -> Result<String, String> {
    let asked = choices
        .iter()
        .find(|choice| choice.from.as_deref() == Some(first));
    if let Some(choice) = asked.or_else(|| choices.iter().find(|choice| choice.from.is_none())) {
        return Ok(choice.to.clone());
    }
    let by_name = names.iter().find(|name| *name == first);
    let only = if names.len() == 1 {
        names.first()
    } else {
        None
    };
    by_name
        .or_else(|| names.iter().find(|name| has_address(name)))
        .or(only)
        .cloned()
        .ok_or_else(|| {
            format!(
                "no device here is {first} or has its address; choose one with --device {first}=NAME: {}",
                names.join(", ")
            )
        })
}
