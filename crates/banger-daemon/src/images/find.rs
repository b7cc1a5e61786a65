//! What a person's word for a thing means, and what comes close to it.

use banger_api::error::{ErrorBody, ErrorCode};
use banger_core::spec::{Resolution, resolve};

/// Finds what `query` means among `all` things of a `kind`, or says what comes close.
pub(crate) fn find<'a, T>(
    kind: &str,
    query: &str,
    all: &'a [T],
    name: impl Fn(&T) -> Option<String>,
    id: impl Fn(&T) -> String,
) -> Result<&'a T, ErrorBody> {
    let named: Vec<(Option<String>, &T)> = all.iter().map(|thing| (name(thing), thing)).collect();
    let describe = |name: &Option<String>, thing: &T| match name {
        Some(name) => format!("{name} ({})", id(thing)),
        None => id(thing),
    };
    match resolve(
        query,
        &named,
        |(name, _)| name.as_deref(),
        |(_, thing)| id(thing),
    ) {
        Resolution::One((_, found)) => Ok(found),
        Resolution::Many(candidates) => {
            let list: Vec<String> = candidates
                .iter()
                .map(|(name, thing)| describe(name, thing))
                .collect();
            let message = format!(
                "`{}` fits {} {kind}s: {}",
                query.escape_debug(),
                list.len(),
                list.join(", ")
            );
            Err(ErrorBody::new(ErrorCode::Ambiguous, message)
                .hint("type more of the one that is meant"))
        }
        Resolution::None => {
            let error = ErrorBody::new(
                ErrorCode::NotFound,
                format!("there is no {kind} `{}`", query.escape_debug()),
            );
            let close = named
                .iter()
                .filter_map(|(name, _)| name.as_deref())
                .min_by_key(|name| distance(name, query));
            Err(match close.filter(|name| distance(name, query) <= 2.max(query.len() / 3)) {
                Some(name) => error.hint(format!("did you mean `{name}`?")),
                None => error.hint(match kind {
                    "image" => "`banger image list` shows all; `banger image build` makes the default one".to_owned(),
                    "kernel" => "`banger kernel list` shows all; `banger kernel import` makes the default one".to_owned(),
                    _ => format!("`banger {} list` shows all", kind.to_ascii_lowercase()),
                }),
            })
        }
    }
}

/// The edit distance between two texts.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(128).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(128).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(query: &str) -> Result<String, ErrorBody> {
        let all = [
            ("calm-otter", "0198aa"),
            ("calm-fox", "0198ab"),
            ("default", "0299cc"),
        ];
        find(
            "image",
            query,
            &all,
            |c| Some(c.0.to_owned()),
            |c| c.1.to_owned(),
        )
        .map(|c| c.0.to_owned())
    }

    #[test]
    fn a_misspelt_name_gets_a_suggestion() {
        let error = look("defualt").unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound);
        assert_eq!(error.hints, ["did you mean `default`?"]);
        assert!(look("zzzzzzzz").unwrap_err().hints[0].contains("banger image list"));
    }

    #[test]
    fn an_ambiguous_prefix_lists_its_candidates() {
        let error = look("calm").unwrap_err();
        assert_eq!(error.code, ErrorCode::Ambiguous);
        assert!(
            error.message.contains("calm-otter (0198aa)") && error.message.contains("calm-fox")
        );
    }
}
