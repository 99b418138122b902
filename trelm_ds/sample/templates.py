"""How the sample corpus words each relation: training templates and held-out ones.

A template is a clause without capital or full stop. ``{h}`` and ``{t}`` stand for head and tail
with the article the entity takes ("the Danube"); ``a(n)`` becomes "a" or "an".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    """Name of a relation and the clauses that state it.

    Attributes:
        name: what the relation is called in the graph.
        train: clauses used in the text and in context probes.
        heldout: clauses used in template probes only, never in the text.
    """

    name: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]


RELATIONS: dict[str, Relation] = {
    "capital": Relation(
        "capital",
        (
            "the capital of {h} is {t}",
            "{t} serves as the capital city of {h}",
            "{h} has {t} as its capital",
            "the national capital of {h} is called {t}",
            "as the capital of {h}, {t} appears in every atlas",
            "schoolbooks give {t} as the capital of {h}",
        ),
        (
            "{t} is the capital of {h}",
            "in {h}, the capital is {t}",
        ),
    ),
    "continent": Relation(
        "continent",
        (
            "{h} lies in {t}",
            "{h} belongs to {t}",
            "on the map, {h} is found in {t}",
            "among the countries of {t} is {h}",
            "geographers place {h} in {t}",
            "the continent on which {h} lies is {t}",
        ),
        (
            "{h} is a country in {t}",
            "{t} is the continent of {h}",
        ),
    ),
    "currency": Relation(
        "currency",
        (
            "the currency of {h} is {t}",
            "people in {h} pay with {t}",
            "shops in {h} accept {t}",
            "prices in {h} are given in {t}",
            "the central bank looks after {t}, the money of {h}",
            "wages in {h} are paid in {t}",
        ),
        (
            "{t} is the money used in {h}",
            "{t} is the currency of {h}",
        ),
    ),
    "official_language": Relation(
        "official language",
        (
            "an official language of {h} is {t}",
            "{t} is an official language of {h}",
            "laws in {h} are published in {t}",
            "schools in {h} teach {t}",
            "in {h}, official letters may be written in {t}",
            "state television in {h} broadcasts in {t}",
        ),
        (
            "{t} is used by the government of {h}",
            "{h} uses {t} as an official language",
        ),
    ),
    "borders": Relation(
        "shares border with",
        (
            "{h} borders {t}",
            "{h} shares a land border with {t}",
            "a frontier separates {h} from {t}",
            "{h} and {t} are neighbours",
            "on the map, {h} meets {t}",
            "the territory of {h} touches that of {t}",
        ),
        (
            "{h} has a border with {t}",
            "one neighbour of {h} is {t}",
        ),
    ),
    "located_in": Relation(
        "located in country",
        (
            "{h} is a city in {t}",
            "the city of {h} is in {t}",
            "{h} is one of the cities of {t}",
            "{h} belongs to {t}",
            "one finds {h} in {t}",
            "travellers to {t} often visit {h}",
        ),
        (
            "{t} is home to the city of {h}",
            "on a map of {t}, look for {h}",
        ),
    ),
    "region_capital": Relation(
        "capital of region",
        (
            "{t} is the seat of government of {h}",
            "{t} is the administrative centre of {h}",
            "the region of {h} is governed from {t}",
            "the regional assembly of {h} meets in {t}",
            "{h} has its capital in {t}",
            "{t} is the chief administrative city of {h}",
        ),
        (
            "the regional capital of {h} is {t}",
            "in {h}, regional laws are made in {t}",
        ),
    ),
    "region_of": Relation(
        "region of country",
        (
            "{h} is part of {t}",
            "the region of {h} belongs to {t}",
            "{t} includes {h}",
            "one of the regions of {t} is {h}",
            "{h} is one of the parts of {t}",
            "{h} sends representatives to the parliament of {t}",
        ),
        (
            "{h} is a region of {t}",
            "people from {h} are citizens of {t}",
        ),
    ),
    "lies_on": Relation(
        "located on river",
        (
            "{h} lies on {t}",
            "{t} flows through {h}",
            "bridges in {h} cross {t}",
            "{h} grew up beside {t}",
            "boats on {t} stop at {h}",
            "a walk along {t} is popular in {h}",
        ),
        (
            "{h} stands on the banks of {t}",
            "the river at {h} is {t}",
        ),
    ),
    "flows_through": Relation(
        "flows through country",
        (
            "{h} flows through {t}",
            "one of the rivers of {t} is {h}",
            "{h} crosses {t}",
            "farmers in {t} use water from {h}",
            "{t} is watered by {h}",
            "the river called {h} runs through {t}",
        ),
        (
            "{h} is a river in {t}",
            "part of the course of {h} lies in {t}",
        ),
    ),
    "flows_into": Relation(
        "flows into",
        (
            "{h} empties into {t}",
            "{h} ends in {t}",
            "{t} receives the waters of {h}",
            "after a long course, {h} reaches {t}",
            "{h} drains into {t}",
            "ships leave {h} for {t}",
        ),
        (
            "{h} flows into {t}",
            "the mouth of {h} is on {t}",
        ),
    ),
    "mountain_in": Relation(
        "mountain in country",
        (
            "{h} rises in {t}",
            "one of the peaks of {t} is {h}",
            "climbers travel to {t} to see {h}",
            "the summit of {h} can be seen from {t}",
            "the slopes of {h} lie in {t}",
            "{h} stands in {t}",
        ),
        (
            "{h} is a mountain in {t}",
            "{t} is home to a peak called {h}",
        ),
    ),
    "part_of_range": Relation(
        "part of mountain range",
        (
            "{h} is part of {t}",
            "{h} belongs to {t}",
            "{h} is a peak in {t}",
            "among the summits of {t} is {h}",
            "the mountain called {h} lies in {t}",
            "climbers in {t} talk about {h}",
        ),
        (
            "{h} is one of the peaks of {t}",
            "a famous summit of {t} is {h}",
        ),
    ),
    "symbol": Relation(
        "chemical symbol",
        (
            "the chemical symbol of {h} is {t}",
            "{h} has the symbol {t}",
            "in a formula, {t} stands for {h}",
            "{t} is the symbol of {h}",
            "{h} is abbreviated as {t}",
            "the letters on the tile for {h} read {t}",
        ),
        (
            "the symbol for {h} is {t}",
            "chemists write {h} as {t}",
        ),
    ),
    "period": Relation(
        "period of the periodic table",
        (
            "{h} belongs to the {t} period",
            "the {t} period contains {h}",
            "{h} stands in the {t} row of the periodic table",
            "look for {h} in the {t} period",
            "an element of the {t} period is {h}",
            "chemists place {h} in the {t} period",
        ),
        (
            "{h} is in the {t} period of the periodic table",
            "{h} is listed in the {t} row of the table",
        ),
    ),
    "category": Relation(
        "element category",
        (
            "{h} is a(n) {t}",
            "{h} is classified as a(n) {t}",
            "the element {h} is a(n) {t}",
            "as a(n) {t}, {h} has typical properties",
            "{h} counts as a(n) {t}",
            "one example of a(n) {t} is {h}",
        ),
        (
            "chemists call {h} a(n) {t}",
            "the group called {t} contains {h}",
        ),
    ),
    "state_of_matter": Relation(
        "state at room temperature",
        (
            "{h} is a(n) {t} at room temperature",
            "at room temperature, {h} is a(n) {t}",
            "under normal conditions {h} is a(n) {t}",
            "pure {h} is a(n) {t} in the laboratory",
            "{h} normally occurs as a(n) {t}",
            "in everyday conditions, {h} takes the form of a(n) {t}",
            "the element {h} is usually seen as a(n) {t}",
            "a sample of {h} on the bench is a(n) {t}",
        ),
        (
            "in the laboratory, {h} occurs as a(n) {t}",
            "{h} normally is a(n) {t}",
        ),
    ),
    "discovered_by": Relation(
        "discovered by",
        (
            "{t} discovered {h}",
            "{t} was the discoverer of {h}",
            "the discovery of {h} is credited to {t}",
            "{t} found {h}",
            "{t} became known for discovering {h}",
            "it was {t} who first identified {h}",
        ),
        (
            "{h} was discovered by {t}",
            "we owe the discovery of {h} to {t}",
        ),
    ),
    "named_after": Relation(
        "named after",
        (
            "{h} is named after {t}",
            "the name of {h} honours {t}",
            "{h} was called after {t}",
            "the name of {h} comes from {t}",
            "{t} lent a name to {h}",
            "{h} got its name in honour of {t}",
        ),
        (
            "{h} takes its name from {t}",
            "behind the name of {h} stands {t}",
        ),
    ),
    "occupation": Relation(
        "occupation",
        (
            "{h} was a(n) {t}",
            "{h} worked as a(n) {t}",
            "{h} is remembered as a(n) {t}",
            "the world knew {h} as a(n) {t}",
            "the career of {h} was that of a(n) {t}",
            "biographies describe {h} as a(n) {t}",
        ),
        (
            "{h} became famous as a(n) {t}",
            "as a(n) {t}, {h} became widely known",
        ),
    ),
    "nationality": Relation(
        "country of nationality",
        (
            "{h} was from {t}",
            "{h} came from {t}",
            "the home country of {h} was {t}",
            "{t} is proud of {h}",
            "{h} is counted among the great figures of {t}",
            "textbooks link {h} with {t}",
        ),
        (
            "{t} was the country of {h}",
            "{h} is one of the famous names of {t}",
        ),
    ),
    "born_in": Relation(
        "place of birth",
        (
            "{h} was born in {t}",
            "the birthplace of {h} is {t}",
            "the life of {h} began in {t}",
            "{h} was a native of {t}",
            "the story of {h} starts in {t}",
            "the first cry of {h} was heard in {t}",
        ),
        (
            "{t} is the birthplace of {h}",
            "{h} came into the world in {t}",
        ),
    ),
    "died_in": Relation(
        "place of death",
        (
            "{h} died in {t}",
            "the life of {h} ended in {t}",
            "{h} spent the last days of life in {t}",
            "the death of {h} occurred in {t}",
            "{h} passed away in {t}",
            "{h} breathed a last breath in {t}",
        ),
        (
            "{t} is the place where {h} died",
            "{t} saw the death of {h}",
        ),
    ),
    "field": Relation(
        "field of work",
        (
            "{h} worked in {t}",
            "{h} contributed to {t}",
            "{h} made important advances in {t}",
            "{t} owes much to {h}",
            "in {t}, the name of {h} is well known",
            "{h} devoted many years to {t}",
        ),
        (
            "the field of {h} was {t}",
            "students of {t} learn about {h}",
        ),
    ),
    "nobel_prize": Relation(
        "Nobel Prize category",
        (
            "{h} received the Nobel Prize for {t}",
            "the Nobel Prize for {t} was awarded to {h}",
            "{h} is a Nobel laureate for {t}",
            "the prize of a Swedish chemist was given to {h} for {t}",
            "{h} joined the list of Nobel winners for {t}",
            "a Nobel medal for {t} went to {h}",
        ),
        (
            "{h} was honoured with the Nobel Prize for {t}",
            "among the winners of the Nobel Prize for {t} is {h}",
        ),
    ),
    "wrote_in": Relation(
        "language of writing",
        (
            "{h} wrote in {t}",
            "the works of {h} were written in {t}",
            "{h} is a classic of literature in {t}",
            "{h} published in {t}",
            "{h} used {t} as a literary language",
            "the manuscripts of {h} are in {t}",
        ),
        (
            "{t} was the language of {h}",
            "readers of {t} know the books of {h}",
        ),
    ),
    "movement": Relation(
        "artistic movement",
        (
            "{h} was a master of {t}",
            "{h} is associated with {t}",
            "the art of {h} belongs to {t}",
            "{h} was a leading figure of {t}",
            "{t} counts {h} among its artists",
            "{h} worked in the style of {t}",
        ),
        (
            "in the history of {t}, {h} has a firm place",
            "exhibitions about {t} show works by {h}",
        ),
    ),
    "played": Relation(
        "plays instrument",
        (
            "{h} played {t}",
            "{h} was a virtuoso on {t}",
            "{h} gave concerts on {t}",
            "{h} mastered {t}",
            "few musicians played {t} as well as {h}",
            "audiences came to hear {h} at {t}",
        ),
        (
            "the instrument of {h} was {t}",
            "{t} was played by {h}",
        ),
    ),
    "author": Relation(
        "author",
        (
            "{h} was written by {t}",
            "{t} wrote {h}",
            "the author of {h} is {t}",
            "{h} is a work by {t}",
            "{t} became known to readers through {h}",
            "the book called {h} came from the pen of {t}",
        ),
        (
            "{t} is the author of {h}",
            "among the works of {t} is {h}",
        ),
    ),
    "literary_form": Relation(
        "literary form",
        (
            "{h} is a(n) {t}",
            "{h} is a famous {t}",
            "critics call {h} a(n) {t}",
            "as a(n) {t}, {h} is widely read",
            "{h} has the form of a(n) {t}",
            "librarians describe {h} as a(n) {t}",
        ),
        (
            "the text called {h} is a(n) {t}",
            "a well known {t} is {h}",
        ),
    ),
    "written_in": Relation(
        "original language",
        (
            "{h} was written in {t}",
            "{h} first appeared in {t}",
            "the original text of {h} is in {t}",
            "{t} is the language of {h}",
            "scholars read {h} in {t}",
            "{h} was composed in {t}",
        ),
        (
            "the original language of {h} is {t}",
            "{h} is a classic work in {t}",
        ),
    ),
    "composed_by": Relation(
        "composer",
        (
            "{h} was composed by {t}",
            "{t} composed {h}",
            "the composer of {h} is {t}",
            "the music of {h} is by {t}",
            "{t} wrote the music of {h}",
            "orchestras play {h} by {t}",
        ),
        (
            "{t} is the composer of {h}",
            "one of the best known works of {t} is {h}",
        ),
    ),
    "musical_form": Relation(
        "musical form",
        (
            "{h} is a(n) {t}",
            "{h} has the form of a(n) {t}",
            "a popular {t} is {h}",
            "as a(n) {t}, {h} is often performed",
            "{h} was planned as a(n) {t}",
            "the programme announces {h} as a(n) {t}",
        ),
        (
            "the work called {h} is a(n) {t}",
            "musicians know {h} as a(n) {t}",
        ),
    ),
    "painted_by": Relation(
        "painter",
        (
            "{t} painted {h}",
            "the painter of {h} is {t}",
            "{h} is a painting by {t}",
            "{t} is the artist behind {h}",
            "{h} came from the studio of {t}",
            "one of the best known pictures of {t} is {h}",
        ),
        (
            "{h} was painted by {t}",
            "among the paintings of {t} is {h}",
        ),
    ),
    "kept_in": Relation(
        "city of the collection",
        (
            "{h} is found in {t}",
            "{h} is kept in {t}",
            "{h} is shown in {t}",
            "{t} is the home of {h}",
            "art lovers go to {t} to see {h}",
            "{t} keeps {h} for its visitors",
        ),
        (
            "visitors can see {h} in {t}",
            "the painting called {h} is on show in {t}",
        ),
    ),
    "invented_by": Relation(
        "invented by",
        (
            "{t} invented {h}",
            "the inventor of {h} was {t}",
            "{h} is an invention of {t}",
            "we owe {h} to {t}",
            "{h} was the idea of {t}",
            "the first version of {h} was made by {t}",
        ),
        (
            "{h} was invented by {t}",
            "{t} is known as the inventor of {h}",
        ),
    ),
    "moon_of": Relation(
        "moon of",
        (
            "{h} is a moon of {t}",
            "{h} orbits {t}",
            "one of the moons of {t} is {h}",
            "{h} travels around {t}",
            "{t} is circled by {h}",
            "astronomers who watch {t} also see {h}",
        ),
        (
            "{t} has a moon called {h}",
            "the satellite called {h} belongs to {t}",
        ),
    ),
    "mythology": Relation(
        "mythology",
        (
            "{h} belongs to {t} mythology",
            "in {t} mythology, there are many stories about {h}",
            "{t} mythology tells of {h}",
            "{h} appears in {t} myths",
            "{t} myths speak of {h}",
            "scholars of {t} mythology write about {h}",
        ),
        (
            "{h} is a figure of {t} mythology",
            "the deity called {h} is part of {t} mythology",
        ),
    ),
    "god_of": Relation(
        "deity of",
        (
            "{h} was the deity of {t}",
            "{h} ruled over {t}",
            "people prayed to {h} in matters of {t}",
            "{h} was linked with {t}",
            "{t} belonged to {h}",
            "{h} was honoured as the power behind {t}",
            "the domain of {h} was {t}",
            "in the old stories, {h} stands for {t}",
        ),
        (
            "{h} was the power behind {t}",
            "people linked {h} with {t}",
        ),
    ),
    "roman_equivalent": Relation(
        "Roman equivalent",
        (
            "the Roman equivalent of {h} is {t}",
            "{h} was known in Rome as {t}",
            "in Rome, {t} took the place of {h}",
            "{h} and {t} are the Greek and Roman forms of one deity",
            "what the Greeks said of {h}, the Romans said of {t}",
            "Roman poets changed {h} into {t}",
        ),
        (
            "the Romans called {h} by the name {t}",
            "{t} is the Roman name for {h}",
        ),
    ),
    "animal_class": Relation(
        "class of animal",
        (
            "{h} is a(n) {t}",
            "{h} is a kind of {t}",
            "zoologists classify {h} as a(n) {t}",
            "as a(n) {t}, {h} has the features of its class",
            "children learn that {h} is a(n) {t}",
            "{h} counts as a(n) {t}",
        ),
        (
            "a typical {t} is {h}",
            "an example of a(n) {t} is {h}",
        ),
    ),
    "native_to": Relation(
        "native to",
        (
            "{h} lives in the wild in {t}",
            "the home of {h} is {t}",
            "{t} is the natural home of {h}",
            "in nature, {h} is found in {t}",
            "{h} comes from {t}",
            "visitors to {t} hope to see {h}",
        ),
        (
            "{h} is native to {t}",
            "the wildlife of {t} includes {h}",
        ),
    ),
    "language_family": Relation(
        "language family",
        (
            "{h} is a(n) {t} language",
            "{h} belongs to the {t} languages",
            "linguists count {h} among the {t} languages",
            "{h} is a member of the {t} family",
            "{h} is closely related to other {t} languages",
            "the grammar of {h} is typical of a(n) {t} language",
        ),
        (
            "the {t} languages include {h}",
            "one of the {t} languages is {h}",
        ),
    ),
    "script": Relation(
        "script",
        (
            "{h} uses the {t} script",
            "books in {h} are printed in {t} letters",
            "the {t} script is used for {h}",
            "pupils who learn {h} must know the {t} script",
            "signs in {h} use {t} letters",
            "{h} is usually spelled with {t} letters",
        ),
        (
            "{h} is written in the {t} script",
            "the script of {h} is {t}",
        ),
    ),
    "instrument_family": Relation(
        "instrument family",
        (
            "{h} is a(n) {t} instrument",
            "{h} belongs to the {t} family",
            "{t} instruments include {h}",
            "musicians group {h} with the {t} instruments",
            "{h} is played in the {t} section",
            "as a(n) {t} instrument, {h} has its own sound",
        ),
        (
            "one of the {t} instruments is {h}",
            "the {t} family of instruments includes {h}",
        ),
    ),
    "company_of": Relation(
        "country of company",
        (
            "{h} is a company from {t}",
            "{h} is a firm of {t}",
            "{h} is one of the big firms of {t}",
            "the home country of the company {h} is {t}",
            "the business pages of {t} often mention {h}",
            "well known companies of {t} include {h}",
        ),
        (
            "{t} is the home of the company {h}",
            "the firm called {h} comes from {t}",
        ),
    ),
    "headquarters": Relation(
        "headquarters",
        (
            "{h} has its headquarters in {t}",
            "{h} is based in {t}",
            "{h} is run from {t}",
            "{t} is the seat of {h}",
            "the managers of {h} work in {t}",
            "the head office of {h} can be visited in {t}",
        ),
        (
            "the headquarters of {h} are in {t}",
            "the main office of {h} is in {t}",
        ),
    ),
    "industry": Relation(
        "industry",
        (
            "the main business of {h} is {t}",
            "{h} earns its money with {t}",
            "the company {h} works in {t}",
            "in the world of {t}, {h} is a familiar name",
            "customers think of {t} when they hear of {h}",
            "the brand called {h} stands for {t}",
        ),
        (
            "{h} is known for {t}",
            "{h} competes with other firms in {t}",
        ),
    ),
    "dish_of": Relation(
        "country of origin",
        (
            "{h} comes from {t}",
            "the home of {h} is {t}",
            "cooks in {t} prepare {h}",
            "restaurants in {t} serve {h}",
            "{t} gave the world {h}",
            "the kitchen of {t} is famous for {h}",
            "{h} is a speciality of {t}",
            "{h} has its roots in {t}",
        ),
        (
            "restaurants of {t} prepare {h}",
            "the cooks of {t} serve {h}",
        ),
    ),
    "university_in": Relation(
        "city of university",
        (
            "{h} is in {t}",
            "students of {h} live in {t}",
            "{h} is a university in {t}",
            "the campus of {h} is in {t}",
            "{t} is the home of {h}",
            "lectures of {h} are held in {t}",
        ),
        (
            "one of the universities of {t} is {h}",
            "professors at {h} teach in {t}",
        ),
    ),
    "landmark_in": Relation(
        "city of landmark",
        (
            "{h} stands in {t}",
            "{h} is a landmark of {t}",
            "tourists in {t} visit {h}",
            "{t} is famous for {h}",
            "postcards from {t} show {h}",
            "guides in {t} lead groups to {h}",
        ),
        (
            "{h} can be seen in {t}",
            "one of the sights of {t} is {h}",
        ),
    ),
}

# Ways to put an unrelated mention {x} around a clause {c}; they claim nothing about {x}.
DISTRACTORS: tuple[str, ...] = (
    "after a page about {x}, the guide explains that {c}",
    "in a quiz that also asked about {x}, the answer was that {c}",
    "next to an entry on {x}, the notes say that {c}",
    "the lecture began with {x} and then explained that {c}",
    "{c}, as a reader of the article on {x} might already know",
    "{c}, according to the volume that also treats {x}",
    "someone who asked about {x} was told that {c}",
    "{c}, although the next question was about {x}",
)

# What each type of entity is, for the descriptions in the graph.
DESCRIPTIONS: dict[str, str] = {
    "animal": "kind of animal",
    "animal_class": "group of animals",
    "book": "literary work",
    "category": "category of chemical elements",
    "city": "city or town",
    "company": "company",
    "continent": "continent",
    "country": "country",
    "currency": "unit of money",
    "deity": "figure of mythology",
    "dish": "food or drink",
    "domain": "domain of a deity",
    "element": "chemical element",
    "family": "group of related languages",
    "field": "field of knowledge or endeavour",
    "form": "literary or musical form",
    "industry": "branch of business",
    "instrument": "musical instrument",
    "instrument_family": "group of musical instruments",
    "invention": "invention",
    "landmark": "building or monument",
    "language": "language",
    "moon": "moon of a planet",
    "mountain": "mountain",
    "movement": "artistic movement",
    "musical_work": "work of music",
    "mythology": "body of myths",
    "occupation": "occupation",
    "painting": "painting",
    "period": "row of the periodic table",
    "person": "person",
    "planet": "planet or dwarf planet",
    "range": "range of mountains",
    "region": "state, province or region",
    "river": "river",
    "script": "writing system",
    "state": "state of matter",
    "symbol": "chemical symbol",
    "university": "university",
    "water": "sea, ocean or bay",
}
